"""Steps that are skipped: what a resumed run knows of them, and when they end a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from framework.execution import LocalNetwork
from framework.local.head import Head
from framework.tracking.metric_log import read_log
from tests.support.marks import slow
from tests.support.pool import Pool
from tests.support.runs import ROOT, assert_same_run, run, toy

PoolOf = Callable[[int], Pool]
RECIPE = str(ROOT / "recipes" / "loco_r50_800ep.yaml")
NETWORK = (
    "network.name=resnet8",
    "network.cut=block",
    "views.kind=cifar",
    "data.workers=0",
    "optim.name=sgd",
)


def arguments(folder: Path, *overrides: str) -> list[str]:
    return [RECIPE, *toy(folder, *NETWORK, "optim.lr=0.05", "optim.warmup_epochs=0", *overrides)]


@contextmanager
def losses_changed(change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Within the context, ``change(step, loss)`` takes the place of what every head returns in training.

    ``step`` counts from 0, with one micro-batch each; not in a pipeline.
    """
    steps = [-1]

    def count(module: nn.Module, inputs: object) -> None:
        steps[0] += isinstance(module, LocalNetwork) and module.training

    def changed(module: nn.Module, inputs: object, output: Tensor) -> Tensor | None:
        return change(steps[0], output) if isinstance(module, Head) and module.training else None

    handles = [
        nn.modules.module.register_module_forward_pre_hook(count),
        nn.modules.module.register_module_forward_hook(changed),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def steep(step: int, loss: Tensor) -> Tensor:
    """The same loss, with an infinite gradient."""
    return loss + (loss - loss.detach()).sqrt()


def run_with_steep_losses(argv: list[str]) -> str:
    from deepspeed.utils import groups

    with losses_changed(steep):
        message = run(argv)
    groups.mpu = (
        None  # where a run that ended with an error leaves a pipeline's grid for the pool's next engine
    )
    return message


ENGINES = [
    "engine=ddp",
    *slow(["engine=fsdp", "zero_stage=0", "zero_stage=1", "zero_stage=2", "pipeline.stages=2"]),
]


@pytest.mark.parametrize("engine", ENGINES)
def test_float16_gradients_that_no_scale_mends_end_the_run(tmp_path: Path, pool: PoolOf, engine: str) -> None:
    """The scale falls from 2^16 to 1 in 16 skipped steps; then it is no overflow."""
    argv = arguments(tmp_path, engine, "method.name=dgl", "train.precision=fp16", "optim.clip=1")
    (message,) = set(pool(2).run(run_with_steep_losses, argv))
    assert message.startswith(
        "the gradient of units layer1.0, layer2.0, layer3.0 is infinite or NaN whatever"
    )
    assert "at step 16: lower optim.lr=0.05" in message and "\n" not in message


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["engine=ddp", "zero_stage=1"])
def test_they_count_where_steps_may_be_skipped(tmp_path: Path, pool: PoolOf, engine: str) -> None:
    skip = ("faults.nonfinite=skip", "faults.nonfinite_limit=3")
    argv = arguments(tmp_path, engine, "method.name=dgl", "train.precision=fp16", *skip)
    (message,) = set(pool(2).run(run_with_steep_losses, argv))
    assert message.startswith(
        "step 19 is the 4th with a loss or gradient that is not finite (the gradient of units"
    )


def run_with_a_poisoned_step(argv: list[str], poisoned: int) -> str:
    with losses_changed(lambda step, loss: loss * torch.nan if step == poisoned else loss):
        return run(argv)


AFTER = ("method.name=mlaan", "method.ema_when=after", "method.ema_m=0.5", "method.lam_on=both")
PLACES: list[object] = [("faults.nonfinite=skip", "engine=ddp")]
PLACES += [pytest.param(("train.precision=fp16", "faults.nonfinite=skip"), marks=pytest.mark.slow)]


@pytest.mark.parametrize("overrides", PLACES, ids=str)
def test_copies_that_follow_after_a_step_know_that_it_was_skipped(
    tmp_path: Path, pool: PoolOf, overrides: tuple[str, ...]
) -> None:
    """Also in a run that goes on behind it; and the schedule waits for the step."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    common = (*AFTER, *overrides, "train.epochs=4")
    assert pool(1).run(run_with_a_poisoned_step, arguments(straight, *common, "train.max_steps=5"), 2) == [""]
    assert pool(1).run(run_with_a_poisoned_step, arguments(broken, *common, "train.max_steps=3"), 2) == [""]
    assert pool(1).run(run, arguments(broken, *common, "train.max_steps=5")) == [""]
    assert_same_run(broken, straight, 5)
    for folder in (straight, broken):
        log = read_log(folder / "run" / "metrics.jsonl")
        rates = [entry["lr"] for entry in log if "losses" in entry]
        assert [entry["skipped"] for entry in log if "losses" in entry] == [step == 2 for step in range(5)]
        assert rates[2] == rates[3] and len(set(rates)) == 4
