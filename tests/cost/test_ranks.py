"""What ranks hold and send, against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from framework.config import loading
from framework.config.recipe import Optim, Sharding
from framework.cost.counting import plan_cost
from framework.cost.gathering import Sharded
from framework.cost.ranks import (
    ENGINES,
    Held,
    RankCost,
    rank_costs,
    states_per_weight,
)
from framework.data.batch import Batch
from framework.execution import LocalNetwork
from framework.execution.uses import STAYS
from framework.local import LocalUnit, Plan, sliding_windows
from framework.local.head import Head
from framework.network import cut
from framework.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
RANKS = 3
SEGMENTS = 5


class Chain(nn.Module):
    """12 weights in the first segment, 16 in each of the other four; a buffer of 8 bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1, bias=False)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.ReLU()) for _ in range(SEGMENTS - 1)
        )
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return x


class Guess(Head):
    """40 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 10, bias=False)

    def loss(self, x: Tensor, batch: Batch) -> Tensor:
        return self.linear(x.mean((2, 3))).square().sum()


# Elements on three ranks: slices of 4 (stem), 6 and 14 (head), so whole and padded 12, 18 and 42.
FIRST, OTHER, HEAD = 12, 18, 42
SLICES = 4 + 4 * 6


def net(window: int) -> LocalNetwork:
    backbone = Chain()
    windows = sliding_windows(SEGMENTS, window)
    plan = Plan(tuple(LocalUnit(str(last), first, last, Guess()) for first, last in windows), SEGMENTS)
    return LocalNetwork(backbone, cut(backbone, "block", image_size=4), plan)


@pytest.mark.parametrize(
    ("window", "gathers", "at_most"),
    [
        # A head comes while its segment is there, and is in its buffer and in its place.
        (1, FIRST + 4 * OTHER + 5 * HEAD, OTHER + 2 * HEAD),
        # So does one of a window of two, whose lower segment has stayed.
        (2, FIRST + 4 * OTHER + 4 * HEAD, 2 * OTHER + 2 * HEAD),
        # Three segments stay until the walk comes; it gathers the two lowest once more.
        (SEGMENTS, 2 * FIRST + 2 * OTHER + 3 * OTHER + HEAD, 3 * OTHER + 2 * HEAD),
    ],
)
def test_gathered_bytes(window: int, gathers: int, at_most: int) -> None:
    network = net(window)
    assert Sharded.of(network, network.uses().turns, STAYS, RANKS) == Sharded(4 * at_most, 4 * gathers)


def test_backpropagation_gathers_segments_twice() -> None:
    held = Held.of(net(SEGMENTS), RANKS, 1, "end to end", Sharding())
    assert held.sharded == Sharded(4 * 2 * HEAD, 4 * (2 * (FIRST + 4 * OTHER) + HEAD))


def costs(window: int, micro_batches: int = 1, ranks: int = RANKS, **options: Any) -> dict[str, RankCost]:
    held = Held.of(net(window), ranks, micro_batches, "local", Sharding(**options))
    return {engine: held.cost(engine, "local", states=2, activations=1000) for engine in ENGINES}


def test_memory_and_traffic_of_each_engine() -> None:
    """12 + 4 x 16 weights in segments, 5 x 40 in heads."""
    found = costs(window=1)
    whole, part = 4 * (12 + 4 * 16 + 5 * 40), 4 * (SLICES + 5 * 14)
    buffers = 8 + 8 * SEGMENTS  # the network's, and the weights of the units' losses
    assert {cost.activations for cost in found.values()} == {1000}
    assert [found[e].weights for e in ("ddp", "ZeRO-1", "ZeRO-2")] == [whole + buffers] * 3
    assert found["fsdp"].weights == part + buffers
    assert found["ddp"].gradients == whole + 4 * 40
    assert found["ZeRO-1"].gradients == whole + part + 4 * 40
    assert found["ZeRO-2"].gradients == found["fsdp"].gradients == part + 4 * (40 + 16) + 4 * 40
    assert [found[e].optimizer for e in ("ddp", "ZeRO-1", "fsdp")] == [2 * whole, 3 * part, 2 * part]
    assert [found[e].sent for e in ("ddp", "ZeRO-2")] == [2 * whole * 2 // 3] * 2
    assert found["fsdp"].sent == 2 * 3 * part * 2 // 3
    assert found["ddp"].memory == 1000 + buffers + 4 * whole + 4 * 40


def test_with_several_micro_batches_all_are_gathered_and_the_sums_reduced() -> None:
    one, two = costs(window=2)["fsdp"], costs(window=2, micro_batches=2)["fsdp"]
    whole, part = 4 * (12 + 4 * 16 + 4 * 40), 4 * (SLICES + 4 * 14)
    assert two.sent - one.sent == 2 * part
    assert two.gradients == part + whole + 4 * 40


def test_reducing_every_micro_batch_sends_as_often_and_holds_what_one_does() -> None:
    one, two = costs(window=1)["fsdp"], costs(window=1, micro_batches=2, reduce_every="micro_batch")["fsdp"]
    assert two == replace(one, sent=2 * one.sent)


def test_replicas_hold_what_fewer_ranks_do_and_add_up_slices() -> None:
    one, two = costs(window=1)["fsdp"], costs(window=1, ranks=2 * RANKS, replicas=2)["fsdp"]
    part = 4 * (SLICES + 5 * 14)
    assert two == replace(one, sent=one.sent + part)


def test_bf16_halves_what_is_gathered_and_reduced() -> None:
    """All weights here have two dimensions and more."""
    full, low = costs(window=1)["fsdp"], costs(window=1, gather="bf16", reduce="bf16")["fsdp"]
    assert (low.gathered, low.sent) == (full.gathered // 2, full.sent // 2)
    travelling, travelling_low = 4 * (40 + 16), 4 * 16 // 2 + 4 * 40 + 4 * 40 // 2
    gradients = full.gradients - travelling + travelling_low
    assert low == replace(full, gathered=low.gathered, sent=low.sent, gradients=gradients)


def test_offloading_leaves_buffers_on_the_device() -> None:
    full, away = costs(window=1)["fsdp"], costs(window=1, offload=True)["fsdp"]
    buffers = 8 + 8 * SEGMENTS
    assert away.host == full.weights - buffers + full.optimizer
    assert away == replace(full, weights=buffers, optimizer=0, host=away.host)


@pytest.mark.parametrize(
    ("optim", "states"),
    [(Optim(), 1), (Optim(name="sgd"), 1), (Optim(name="sgd", momentum=0.0), 0), (Optim(name="adamw"), 2)],
)
def test_states_of_optimizers(optim: Optim, states: int) -> None:
    assert states_per_weight(optim) == states


def test_a_batch_that_cannot_be_divided() -> None:
    recipe = loading.load([str(ROOT / "recipes" / "quickstart.yaml"), "train.accumulation=2"])
    message = (
        rf"^train.batch_size={recipe.train.batch_size}: must be a multiple of 14 \(train.accumulation=2 x 7"
    )
    with pytest.raises(UserError, match=message):
        rank_costs(recipe, 10, 7)


def test_without_values_the_counts_are_the_same() -> None:
    """Networks that are to be built in slices are counted without values."""
    recipe = loading.load([str(ROOT / "recipes" / "quickstart_sharded.yaml"), "network.args.depth=2"])
    whole = replace(recipe, engine="ddp")
    assert rank_costs(recipe, 10, 4) == rank_costs(whole, 10, 4)
    assert plan_cost(recipe, 10, 4) == plan_cost(whole, 10, 4)


def test_replicas_that_do_not_divide_the_ranks() -> None:
    recipe = loading.load([str(ROOT / "recipes" / "quickstart_sharded.yaml"), "sharding.replicas=2"])
    with pytest.raises(UserError, match=r"^sharding.replicas=2: must divide the 7 ranks$"):
        rank_costs(recipe, 10, 7)
