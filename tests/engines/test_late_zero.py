"""ZeRO-1 and ZeRO-2: gradients are scattered when they are finished, weights are gathered for their next use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from torch import Tensor

from framework.engines import buckets
from framework.engines.deepspeed import DeepSpeedEngine
from framework.engines.late_zero import Partitions
from tests.support import networks, training
from tests.support.marks import slow
from tests.support.training import Case, Run, differences, plain, train

PoolOf = Callable[[int], Any]
LAYERS = ("layer1", "layer2", "layer3")


class Noting(Partitions):
    """The wire of the engine, which notes what begins and what is waited for."""

    def __init__(self, events: list[tuple[str, Any]], names: Callable[[Tensor], frozenset[str]]) -> None:
        super().__init__()
        self.events, self.names = events, names

    def scatter(self, flat: Tensor) -> Any:
        self.events.append(("scatters", flat.numel()))
        part, pending = super().scatter(flat)
        assert 2 * part.numel() == flat.numel()
        return part, Noted(pending, self.events, ("has", flat.numel()))

    def gather(self, flat: Tensor, part: Tensor) -> Any:
        self.events.append(("gathers", self.names(flat)))
        return Noted(super().gather(flat, part), self.events, ("whole", self.names(flat)))


class Noted:
    def __init__(self, pending: Any, events: list[tuple[str, Any]], event: tuple[str, Any]) -> None:
        self.pending, self.events, self.event = pending, events, event

    def wait(self) -> None:
        self.pending.wait()
        self.events.append(self.event)


def noted_steps(case: Case) -> tuple[list[list[tuple[str, Any]]], list[int]]:
    """What happens on a rank in two steps of ResNet-8 and in what follows them; numbers of its segments' weights."""
    net = training.network(case)
    events: list[tuple[str, Any]] = []

    def names(flat: Tensor) -> frozenset[str]:
        begin, end = flat.data_ptr(), flat.data_ptr() + flat.numel() * flat.element_size()
        inside = [name for name, p in net.named_parameters() if begin <= p.data_ptr() < end]
        return frozenset(layer for layer in LAYERS if any(layer in name for name in inside))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(buckets, "SMALLEST", 64)
        engine = DeepSpeedEngine(
            net, training.optimizer_factory(case), training.settings(case), Noting(events, names)
        )
    for layer in LAYERS:
        first = next(net.backbone.get_submodule(layer).children())
        first.register_forward_pre_hook(lambda *_, layer=layer: events.append(("runs", layer)))
    found = []
    for step in range(2):
        training.advance(engine, case, range(step, step + 1))
        found.append(events.copy())
        events.clear()
    engine.close()
    return [*found, events], [sum(p.numel() for p in segment.parameters()) for segment in net.segments]


def total(events: list[tuple[str, Any]], kind: str = "scatters") -> int:
    return sum(what for event, what in events if event == kind)


@pytest.mark.parametrize(("method", "ahead", "stage"), slow([("gim", 1, 1), ("gim", 1, 2), ("loco", 2, 1)]))
def test_gradients_leave_while_the_next_segments_run(
    pool: PoolOf, method: str, ahead: int, stage: int
) -> None:
    """In windows of two a segment later, and once. ZeRO-2, to keep no more than slices, waits for those before."""
    case = Case(method, optimizer="sgd", zero_stage=stage)
    (first, second, rest), numbers = pool(2).run(noted_steps, case)[0]
    for number, layer in enumerate(LAYERS):
        before = first[: first.index(("runs", layer))]
        assert total(before) >= sum(numbers[: max(0, number - ahead + 1)])
        assert number or not before
    assert {kind for kind, _ in first} == {"runs", "scatters"} | ({"has"} if stage == 2 else set())
    assert total(first) == total(second) >= sum(numbers)
    assert total(first + second + rest, "has") == total(first) + total(second)
    assert stage == 2 or total(second, "has") == total(first)


@pytest.mark.parametrize("stage", [1, *slow([2])])
def test_weights_travel_while_the_segment_below_runs(pool: PoolOf, stage: int) -> None:
    """A segment runs when all that it uses is there; what the one above uses is under way by then."""
    (_, second, rest), _ = pool(2).run(noted_steps, Case("gim", optimizer="sgd", zero_stage=stage))[0]
    for number, layer in enumerate(LAYERS):
        runs = second.index(("runs", layer))
        asked, there = (
            [i for i, event in enumerate(second) if event == (kind, {layer})] for kind in ("gathers", "whole")
        )
        assert asked and len(asked) == len(there) and max(there) < runs
        if number:
            lower = second.index(("runs", LAYERS[number - 1]))
            assert max(asked) < lower < min(there)
    gathers = [what for kind, what in second if kind == "gathers"]
    assert all(len(what) < 2 for what in gathers)
    assert [what for kind, what in rest if kind == "gathers"] == gathers and total(rest) == 0


@pytest.mark.parametrize("stage", slow([1, 2]))
def test_what_is_kept_of_gradients_decides_how_often_they_travel(pool: PoolOf, stage: int) -> None:
    """ZeRO-2 keeps a part of every micro-batch's, ZeRO-1 keeps all and sends their sum."""
    case = Case("gim", zero_stage=stage)
    once, often = (
        total(pool(2).run(noted_steps, replace(case, accumulation=accumulation))[0][0][0])
        for accumulation in (1, 4)
    )
    assert often == (4 if stage == 2 else 1) * once > 0


def in_small_buckets(case: Case) -> Run | None:
    """These networks would have one bucket each."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(buckets, "SMALLEST", 64)
        return train(case)


DYADIC = [
    Case(optimizer=optimizer, accumulation=accumulation, zero_stage=stage)
    for stage, optimizer, accumulation in product((0, 1, 2), ("lars", "adamw"), (1, 2))
]


@pytest.mark.parametrize(
    ("case", "ranks"), [(DYADIC[9], 2), *slow([(DYADIC[7], 2), *product(DYADIC, (1, 4))])], ids=str
)
def test_many_buckets_are_one_process_to_the_last_bit(pool: PoolOf, case: Case, ranks: int) -> None:
    assert differences(pool(ranks).run(in_small_buckets, case)[0], plain(case)) == {}


@pytest.mark.parametrize("stage", slow([0, 1, 2]))
def test_parts_are_clipped_by_the_norm_of_all(pool: PoolOf, stage: int) -> None:
    case = Case(zero_stage=stage, optimizer="sgd", accumulation=2, clip=0.05)
    errors = differences(pool(4).run(in_small_buckets, case)[0], plain(case))
    assert max(errors.values(), default=0) < 1e-6


LOCAL = [
    Case("gim"),
    Case("loco", optimizer="adamw"),
    Case("loco", optimizer="sgd", options={"soft_share": 0.5}),
    Case("mlaan", "block", options={"ema_m": 0.9, "ema_when": "after"}),
    Case("loco", optimizer="adamw", options={"head": networks.taught("byol")}),
    Case("gim", "block", accumulation=2),
    Case("bp"),
]


@pytest.mark.parametrize(
    ("case", "stage"),
    slow(product(LOCAL, (0, 1, 2))),
    ids=str,
)
def test_local_networks_equal_ddp_which_equals_one_process(pool: PoolOf, case: Case, stage: int) -> None:
    """To the last bit, but where ZeRO-2 adds up the ranks' gradients before those of the micro-batches."""
    reordered = stage == 2 and case.accumulation > 1
    case = replace(case, steps=1 if reordered else 3)
    ddp = pool(2).run(train, replace(case, engine="ddp"))[0]
    errors = differences(pool(2).run(in_small_buckets, replace(case, zero_stage=stage))[0], ddp)
    assert max(errors.values(), default=0) < 1e-4 if reordered else errors == {}


@pytest.mark.parametrize("stage", slow([1, 2]))
def test_one_step_of_local_networks_equals_one_process(pool: PoolOf, stage: int) -> None:
    """In float32, as exactly as sums in another order can be; a first step's momentum is the gradient."""
    for case in (Case("gim"), Case("loco"), Case("loco", options={"soft_share": 0.5}), Case("gim", clip=0.1)):
        case = replace(case, optimizer="sgd", steps=1, accumulation=2, zero_stage=stage)
        run = pool(2).run(in_small_buckets, case)[0]
        assert max(differences(run, plain(case)).values()) < 1e-3, case
