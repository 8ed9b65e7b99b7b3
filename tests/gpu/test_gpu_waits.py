"""No training step makes the host wait for the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from framework.engines import EngineSettings, ddp
from framework.optim import build_optimizer
from framework.runtime.requests import Request
from framework.training.late_numbers import LateNumbers
from tests.support import networks
from tests.support.networks import CASES, OF_METHODS

pytestmark = pytest.mark.gpu

LOW = [(case, precision) for precision in ("bf16", "fp16") for case in OF_METHODS.values()]


@contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, whatever makes the host wait raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("case", "precision"), [*((case, "fp32") for case in CASES), *LOW])
def test_no_step_waits_for_the_gpu(gpu: torch.device, case: str, precision: str) -> None:
    """Forward, heads, routing, teachers and copies, LARS; after two steps in which libraries set themselves up."""
    net = networks.network(case, precision=precision).to(gpu)
    optimizer = build_optimizer(net, name="lars")
    data = networks.on(gpu, networks.batch(net), torch.float32)

    def step() -> None:
        net(data).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
    with no_waiting():
        step()


@pytest.mark.parametrize("optimizer", ["lars", "adamw"])
def test_no_engine_waits_for_the_gpu(gpu: torch.device, optimizer: str) -> None:
    """Steps that may be skipped, and their numbers on the way to the host."""
    net = networks.network("mlaan", precision="fp16").to(gpu)
    data = networks.on(gpu, networks.batch(net), torch.float32)
    settings = EngineSettings(batch_size=len(data.images), clip=1.0)
    engine = ddp.build(net, partial(build_optimizer, name=optimizer), settings)

    def step() -> LateNumbers:
        return LateNumbers(engine.step([data], lambda: 0.1), Request.NOTHING, written=True)

    for _ in range(2):
        step()
    with no_waiting():
        numbers = step()
    assert numbers.losses() is not None and numbers.request() is Request.NOTHING
    engine.close()


def test_waiting_would_be_found(gpu: torch.device) -> None:
    number = torch.ones((), device=gpu)
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting():
        float(number)
