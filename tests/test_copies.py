"""Copies in heads, and frozen weights, under every engine on two ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pool import Pool
from torch import Tensor

from framework.distributed import is_main
from tests import training
from tests.training import Case

pytestmark = pytest.mark.slow

ENGINES = ["ddp", "fsdp", "deepspeed"]


def copies(model: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the moving averages."""
    return {name: v for name, v in model.items() if ".ema." in name and name.endswith((".weight", ".bias"))}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_copies_move_once_a_step_as_in_one_process(
    pool: Callable[[int], Pool], engine: str, accumulation: int
) -> None:
    case = Case("mlaan", "block", "sgd", engine, accumulation=accumulation)
    reference = training.plain(case)
    run = pool(2).run(training.train, case)[0]
    start = copies(training.network(case).state_dict())
    ours, theirs = copies(run.model), copies(reference.model)
    assert (
        len(start) == 9 and ours.keys() == theirs.keys() == start.keys()
    )  # two convolutions, three norms ...
    moved = max(float((theirs[name] - start[name]).abs().max()) for name in start)
    assert moved > 0
    for name in start:
        # Copies move by less than a thousandth of themselves, of which float32 leaves two digits; moved twice is 100 %.
        assert float((ours[name] - theirs[name]).abs().max()) < 0.05 * moved, name
    assert not any(".ema." in name for name in run.optimizer)


def train_frozen(case: Case) -> dict[str, bool] | None:
    """Which parameters moved in two steps with the first weight of the first head frozen."""
    net = training.network(case)
    net.plan.units[0].head.trunk[1].weight.requires_grad_(False)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    engine = training.build(case, net)
    training.advance(engine, case, range(2))
    model = engine.model_state()
    engine.close()
    return {name: not torch.equal(model[name], value) for name, value in start.items()} if is_main() else None


@pytest.mark.parametrize("engine", ENGINES)
def test_frozen_weights_of_a_head_stay(pool: Callable[[int], Pool], engine: str) -> None:
    moved = pool(2).run(train_frozen, Case("dgl", "block", "sgd", engine))[0]
    assert [name for name, was_moved in moved.items() if not was_moved] == ["heads.layer1_0.trunk.1.weight"]
