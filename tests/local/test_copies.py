"""Copies in heads, and frozen weights, under every engine on two ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from framework.execution import LocalNetwork
from framework.local.copies import PulledCopy
from framework.runtime.distributed import is_main
from tests.support import training
from tests.support.marks import slow
from tests.support.pool import Pool
from tests.support.training import Case

ENGINES = ["ddp", "fsdp", "deepspeed"]


def copies(model: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the moving averages."""
    return {name: v for name, v in model.items() if ".ema." in name and name.endswith((".weight", ".bias"))}


def apart(case: Case) -> LocalNetwork:
    """The network, its copies well away from the blocks that they follow."""
    net = training.network(case)
    with torch.no_grad():
        for parameter in net.backbone.parameters():
            parameter.add_(0.1)
    return net


def train_apart(case: Case) -> training.Run | None:
    return training.train(case, apart(case))


@pytest.mark.parametrize(
    ("engine", "accumulation"),
    [("fsdp", 2), *slow([(engine, 1) for engine in ENGINES]), *slow([("ddp", 2), ("deepspeed", 2)])],
)
def test_copies_move_once_a_step(pool: Callable[[int], Pool], engine: str, accumulation: int) -> None:
    """By 0.5 % of the way each: weights hardly change in three steps at these rates."""
    two = {"lam_weights": "two_copies"}
    case = Case("mlaan", "block", "sgd", engine, accumulation=accumulation, options=two)
    run = pool(2).run(train_apart, case)[0]
    start, now = copies(apart(case).state_dict()), copies(run.model)
    assert len(start) == 9 and now.keys() == start.keys()
    for name in start:
        moved = (now[name] - start[name]).median()
        assert moved.item() == pytest.approx(0.1 * (1 - 0.995**3), rel=0.1), name
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


@pytest.mark.parametrize("engine", [*slow(["ddp", "fsdp"]), "deepspeed"])
def test_frozen_weights_of_a_head_stay(pool: Callable[[int], Pool], engine: str) -> None:
    moved = pool(2).run(train_frozen, Case("dgl", "block", "sgd", engine))[0]
    assert [name for name, was_moved in moved.items() if not was_moved] == ["heads.layer1_0.trunk.1.weight"]


class Twice(nn.Module):
    """One layer under two names, and another that shares its weight alone: each is the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.again = self.first
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.again(torch.relu(self.first(x))))


def test_a_pulled_copy_of_a_block_that_uses_a_weight_at_three_places() -> None:
    """Both passes run with p + c everywhere, and the gradient of p is the sum over the places."""
    torch.manual_seed(0)
    block = Twice()
    copied, x = PulledCopy(block, 0.9), torch.randn(5, 3)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(1.0)
    for _ in range(2):
        copied.follow(block, 1.0)
        own = {
            n: p.detach() + copied.get_buffer(n.replace(".", "_") + "_pull")
            for n, p in copied.block.named_parameters()
        }
        weight, bias = (own[f"first.{n}"].requires_grad_() for n in ("weight", "bias"))
        expected = (torch.relu(x @ weight.T + bias) @ weight.T + bias) @ weight.T
        found = copied(x)
        copied.zero_grad()
        found.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(copied.block.first.weight.grad, weight.grad)
        torch.testing.assert_close(copied.block.first.bias.grad, bias.grad)
