"""Engines on one rank: NCCL on a GPU, gloo in a rehearsal. Pipelines take two GPUs: NCCL has one rank on each."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from framework.runtime import joining
from framework.runtime.launch import LAUNCH_VARIABLES
from tests.support import training
from tests.support.training import Case, differences

pytestmark = pytest.mark.gpu

ENGINES = [
    Case(engine="ddp"),
    Case(engine="fsdp"),
    Case(zero_stage=0),
    Case(zero_stage=1),
    Case(zero_stage=2),
]


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """This process, joined with no other."""
    before = {name: os.environ.get(name) for name in LAUNCH_VARIABLES}
    joining.start()
    yield
    joining.stop()
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def test_ranks_on_gpus_meet_by_nccl(gpu: torch.device, one_rank: None) -> None:
    assert dist.get_backend() == "nccl"
    number = torch.full((3,), 2.0, device=gpu)
    dist.all_reduce(number)
    assert number.tolist() == [2.0] * 3


@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw"])
@pytest.mark.parametrize("case", ENGINES, ids=str)
def test_every_engine_is_the_plain_loop(
    device: torch.device, one_rank: None, case: Case, optimizer: str
) -> None:
    """Gradients that sum without rounding; two micro-batches; clipping by a norm that is never reached."""
    case = Case(**{**vars(case), "optimizer": optimizer, "accumulation": 2, "clip": 100.0})
    run = training.train(case)
    assert run is not None
    errors = differences(run, training.plain(case))
    assert max(errors.values(), default=0) < 1e-5


@pytest.mark.parametrize("method", ["loco", "mlaan"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_local_networks_are_the_plain_loop(
    device: torch.device, one_rank: None, engine: str, method: str
) -> None:
    """In float64, with SyncBatchNorm; DeepSpeed keeps float32."""
    case = Case(method, engine=engine, accumulation=2, dtype="float64")
    run = training.train(case)
    assert run is not None
    errors = differences(run, training.plain(case))
    assert max(errors.values(), default=0) < 1e-6


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp", "deepspeed"])
def test_local_networks_learn_in_every_precision(
    device: torch.device, one_rank: None, engine: str, precision: str
) -> None:
    """Losses of GIM stay beside those of the plain loop in float32."""
    case = Case("gim", engine=engine, precision=precision, steps=4)
    run = training.train(case)
    assert run is not None and torch.isfinite(run.losses).all()
    expected = training.plain(Case("gim", steps=4))
    assert torch.allclose(run.losses[0], expected.losses[0], rtol=0.05)
