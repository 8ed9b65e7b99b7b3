"""``engine=fsdp``: what is whole at what time, what travels, and that no option changes the numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from framework.engines.base import set_learning_rate
from framework.local.copies import followers
from tests.support import training
from tests.support.marks import slow
from tests.support.training import Case, differences, plain, train

PoolOf = Callable[[int], Any]
LOCAL = Case("loco", "block", "sgd", "fsdp", accumulation=2, dtype="float64")


@pytest.mark.parametrize(
    ("sharding", "ranks"),
    [
        ({"replicas": 2}, 2),
        *slow([({"replicas": 2, "reduce_every": "micro_batch"}, 4), ({"offload": True}, 2)]),
        *slow([({"reduce_every": "micro_batch"}, 2), ({"replicas": 4}, 4)]),
        *slow([({"replicas": 2, "offload": True}, 4)]),
    ],
)
def test_options_equal_one_process(pool: PoolOf, sharding: dict[str, Any], ranks: int) -> None:
    case = replace(LOCAL, sharding=sharding)
    errors = differences(pool(ranks).run(train, case)[0], plain(case))
    assert max(errors.values()) < 1e-11


@pytest.mark.parametrize("optimizer", slow(["lars", "adamw", "sgd"]))
@pytest.mark.parametrize("sharding", [{"gather": "bf16"}], ids=str)
def test_low_precision_weights_are_those_that_autocast_makes(
    pool: PoolOf, optimizer: str, sharding: dict[str, Any]
) -> None:
    """No weight is used in another type than autocast would cast it to, so that nothing is rounded twice."""
    case = Case("gim", "block", optimizer, "fsdp", precision="bf16")
    whole, low = (pool(2).run(train, c)[0] for c in (case, replace(case, sharding=sharding)))
    assert differences(low, whole) == {}


class Traffic(NamedTuple):
    """Elements of one optimizer step: by collective, largest number whole at once; and of all weights, of the averages
    in heads, of the largest segment with all heads, and of the segments that backpropagation gathers again.
    """

    gathered: int
    reduced: int
    whole: int
    weights: int
    averages: int
    largest: int
    again: int


def traffic(case: Case) -> Traffic:
    """Of the second step; the first has no updates to wait for."""
    net = training.network(case)
    weights = sum(p.numel() for p in net.parameters())
    averages = sum(b.numel() for b in followers(net.heads))
    segments = [sum(p.numel() for p in segment.parameters()) for segment in net.segments]
    heads = sum(p.numel() for p in net.parameters()) - sum(segments)
    engine = training.build(case, net)
    training.advance(engine, case, range(1))
    sent, whole = Counter[str](), [0]
    gather, scatter = dist.all_gather_into_tensor, dist.reduce_scatter_tensor

    def gathering(out: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent["gathered"] += out.numel()
        return gather(out, *args, **kwargs)

    def scattering(out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent["reduced"] += x.numel()
        return scatter(out, x, *args, **kwargs)

    def look(*_: object) -> None:
        whole[0] = max(whole[0], sum(p.numel() for p in net.parameters() if p.ndim != 1 or p.numel() == 0))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather_into_tensor", gathering)
        patch.setattr(dist, "reduce_scatter_tensor", scattering)
        for module in net.modules():
            module.register_forward_hook(look)
        training.advance(engine, case, range(1, 2))
    return Traffic(
        sent["gathered"],
        sent["reduced"],
        whole[0],
        weights,
        averages,
        max(segments) + heads,
        sum(segments[:-3]),
    )


@pytest.mark.parametrize(
    ("method", "window"),
    [("gim", 1), *slow([("dgl", 1), ("loco", 2), ("mlaan", 2), ("bp", 3)])],
)
def test_local_learning_gathers_a_weight_once_and_backpropagation_twice(
    pool: PoolOf, method: str, window: int
) -> None:
    """Slices are padded by less than an element a rank and tensor. Vectors, as slices are, do not count as whole."""
    case = Case(method, "block", "sgd", "fsdp", network="resnet14")
    found = pool(2).run(traffic, case)[0]
    used = found.weights + found.averages + (found.again if method == "bp" else 0)
    assert used <= found.gathered <= 1.02 * used
    assert found.weights <= found.reduced <= 1.02 * found.weights
    assert 0 < found.whole <= (window + 1) * found.largest


def test_gradients_are_summed_in_the_type_asked_for(pool: PoolOf) -> None:
    """Of two ranks: each rounds its half of the average, and their sum is rounded once more."""
    case = Case(optimizer="sgd", engine="fsdp", steps=1, sharding={"reduce": "bf16"})
    net = training.network(case)
    optimizer = training.optimizer_factory(case)(net)
    halves = []
    for part in range(2):
        (batch,) = training.micro_batches(case, 0, part, 2)
        halves.append([g / 2 for g in torch.autograd.grad(net(batch).loss, list(net.weights))])
    for weight, one, other in zip(net.weights, *halves, strict=True):
        weight.grad = (one.bfloat16() + other.bfloat16()).float()
    assert any((w.grad != a + b).any() for w, a, b in zip(net.weights, *halves, strict=True))
    set_learning_rate(optimizer, training.learning_rate(case, 0))
    optimizer.step()
    found = pool(2).run(train, case)[0].model
    for name, weight in net.named_parameters():
        assert torch.equal(found[name], weight), name
