"""Whole runs in pipeline stages: what is refused before they start, and checkpoints that move between them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from framework.config import loading
from framework.runtime.errors import UserError
from tests.support.pool import Pool
from tests.support.runs import ROOT, losses, run, toy, weights

RECIPE = str(ROOT / "recipes" / "loco_r50_800ep.yaml")
PoolOf = Callable[[int], Pool]


def arguments(folder: Path, steps: int, *overrides: str) -> list[str]:
    """MLAAN on six segments, a checkpoint a step."""
    network = ("network.name=resnet14", "network.cut=block", "method.name=mlaan", "views.kind=cifar")
    length = ("train.epochs=10", f"train.max_steps={steps}", "checkpoint.every_steps=1", "checkpoint.keep=99")
    return [RECIPE, *toy(folder, *network, *length, "data.workers=0", "optim.lr=0.05", *overrides)]


# Ranks and settings of each step of the run.
JOURNEY = [
    (1, []),
    (2, ["pipeline.stages=2", "pipeline.balance=time"]),
    (4, ["pipeline.stages=4", "pipeline.balance=memory"]),
    (2, ["zero_stage=2"]),
    (4, ["pipeline.stages=2", "pipeline.balance=[5,1]"]),
    (4, ["pipeline.stages=4", "pipeline.balance=parameters", "zero_stage=0"]),
    (1, ["engine=ddp"]),
]


@pytest.mark.slow
def test_a_run_moves_between_stages_and_plain_data_parallel(tmp_path: Path, pool: PoolOf) -> None:
    """Copies that follow, optimizer and data go along. (LoCo's steps blow a difference in the last bit up tenfold.)"""
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    assert pool(1).run(run, arguments(whole, len(JOURNEY))) == [""]
    for step, (ranks, settings) in enumerate(JOURNEY, start=1):
        assert set(pool(ranks).run(run, arguments(moved, step, *settings))) == {""}
    for ours, theirs in zip(losses(moved), losses(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    first, ours, theirs = weights(whole, 1), weights(moved, len(JOURNEY)), weights(whole, len(JOURNEY))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        way = (tensor - first[name]).float().norm()
        assert (ours[name] - tensor).float().norm() <= 0.01 * way + 1e-7 * tensor.float().norm(), name


PRECISIONS = ["fp16", "fp32", "bf16", "fp16"]


@pytest.mark.slow
def test_a_run_of_stages_changes_its_precision_as_one_of_one_process_does(
    tmp_path: Path, pool: PoolOf
) -> None:
    for step, precision in enumerate(PRECISIONS, start=1):
        for ranks in (1, 2):
            settings = (f"train.precision={precision}", f"pipeline.stages={ranks}")
            folder = tmp_path / str(ranks)
            assert set(pool(ranks).run(run, arguments(folder, step, *settings))) == {""}
    for ours, theirs in zip(losses(tmp_path / "2"), losses(tmp_path / "1"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pipeline.micro_batches=3"], "pipeline.micro_batches=3: must divide train.batch_size=64"),
        (["train.accumulation=3"], "train.accumulation=3: must divide train.batch_size=64"),
        (["zero_stage=2"], "zero_stage=2: must be 0 or 1 with pipeline stages"),
        (["engine=ddp"], "engine=ddp: pipeline stages need engine=deepspeed"),
        (
            ["pipeline.micro_batches=2", "train.accumulation=4"],
            "pipeline.micro_batches=2: train.accumulation=4 says otherwise",
        ),
    ],
)
def test_a_recipe_that_no_pipeline_can_run(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        loading.load(arguments(tmp_path, 1, "pipeline.stages=2", *overrides))
    assert str(error.value).endswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pipeline.stages=4", "network.cut=stage"], "the network has 3 segments, so at most 3 stages"),
        (["pipeline.stages=3"], "pipeline.stages=3: must divide the number of ranks, 4"),
        (
            ["pipeline.stages=4", "pipeline.balance=[2,2,2]"],
            "pipeline.balance=[2, 2, 2]: must be the numbers",
        ),
        (["pipeline.stages=2", "train.batch_size=60", "pipeline.micro_batches=4"], "must be a multiple of"),
    ],
)
def test_ranks_that_no_pipeline_can_use(
    tmp_path: Path, pool: PoolOf, overrides: list[str], message: str
) -> None:
    """One line, the same on all ranks, before anything is written."""
    (said,) = set(pool(4).run(run, arguments(tmp_path, 1, *overrides)))
    assert message in said and "\n" not in said
    assert not (tmp_path / "run").exists()
