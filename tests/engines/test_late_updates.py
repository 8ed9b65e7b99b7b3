"""Gradients that are sent as they are finished, and weights that are updated just before they are used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from framework.data.batch import Batch
from framework.engines.buckets import SMALLEST, Bucket, filled
from framework.engines.late import LateUpdates
from framework.execution.hooks import Finishing
from framework.model import local_network
from framework.optim import SGD
from tests.support import networks, training
from tests.support.marks import slow
from tests.support.training import Case, differences, plain, train

RESNET18 = ("layer1", "layer2", "layer3", "layer4")


class Log:
    """A ``Wire`` to nobody that notes when tensors leave and are waited for."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    def sum(self, x: Tensor) -> Any:
        self.events.append(("sent", x.numel()))
        return self

    def wait(self) -> None:
        self.events.append(("waited", None))

    def close(self) -> None:
        self.events.append(("closed", None))


def traced(method: str) -> tuple[Any, Log, LateUpdates]:
    torch.manual_seed(0)
    net = local_network("resnet18", method, image_size=32, num_classes=4).train()
    log = Log()
    updates = LateUpdates(net, SGD(net.parameters(), lr=0.1), 0.0, log, 1)
    for segment in RESNET18:
        first = next(net.backbone.get_submodule(segment).children())
        first.register_forward_pre_hook(lambda *_, name=segment: log.events.append(("runs", name)))
    return net, log, updates


def step(updates: LateUpdates) -> list[float]:
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(4)
    return updates.step([Batch(images, labels, 2)], lambda: 0.1).losses()()


@pytest.mark.parametrize(("method", "ahead"), [("gim", 1), ("loco", 2)])
def test_gradients_leave_while_the_next_segments_run(method: str, ahead: int) -> None:
    """But for what a bucket waits for. In windows of two it is a segment later; at the end the lowest goes first."""
    net, log, updates = traced(method)
    step(updates)
    numbers = [sum(p.numel() for p in segment.parameters()) for segment in net.segments]
    sent = 0
    for kind, what in log.events:
        if kind == "sent":
            sent += what
        else:
            finished = RESNET18.index(what) - ahead
            assert sent >= sum(numbers[: max(0, finished)])
    assert sent == sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert log.events[-1] == ("sent", numbers[3])


@pytest.mark.parametrize(("method", "ahead"), [("gim", 1), *slow([("loco", 1), ("mlaan", 2)])])
def test_a_weight_changes_just_before_it_is_used(method: str, ahead: int) -> None:
    """But for what shares a bucket with it. So does what copies in heads follow as it was before a step."""
    net, log, updates = traced(method)
    step(updates)
    before = [[p.detach().clone() for p in segment.parameters()] for segment in net.segments]
    changed: dict[str, list[bool]] = {}

    def look(name: str) -> None:
        changed[name] = [
            any(not torch.equal(a, b) for a, b in zip(old, segment.parameters(), strict=True))
            for old, segment in zip(before, net.segments, strict=True)
        ]

    for name in RESNET18:
        first = next(net.backbone.get_submodule(name).children())
        first.register_forward_pre_hook(lambda *_, name=name: look(name))
    waits = sum(kind == "waited" for kind, _ in log.events)
    assert waits == 0
    step(updates)
    assert changed["layer1"] == [number < ahead for number in range(4)]
    assert changed["layer3"] == [True, True, True, False]
    assert changed["layer4"] == [True] * 4
    updates.close()
    kinds = [kind for kind, _ in log.events]
    assert kinds.count("sent") == kinds.count("waited") and kinds[-1] == "closed"


READERS = [
    Case("loco", optimizer="sgd"),
    Case("mlaan", "block", optimizer="lars", options={"ema_m": 0.9, "ema_when": "after"}),
    Case("loco", optimizer="adamw", options={"head": networks.taught("byol")}),
    Case("loco", optimizer="sgd", options={"soft_share": 0.5}),
    Case("dgl", optimizer="adamw", accumulation=2),
    Case("dgl", optimizer="sgd", clip=0.01),
]


@pytest.mark.parametrize("case", [*READERS[:4], *slow(READERS[4:])], ids=str)
def test_late_updates_are_those_of_a_plain_loop(case: Case) -> None:
    """To the last bit: heads that read weights, a teacher and a penalty see them as if they had never been late."""
    run = train(Case(**{**vars(case), "engine": "ddp"}))
    assert run is not None and differences(run, plain(case)) == {}


def test_looking_at_gradients_on_their_way_changes_nothing() -> None:
    """Where steps may be skipped; none is. The optimizer's steps are undone by a flag that is not set."""
    case = Case("dgl", optimizer="adamw", engine="ddp", accumulation=2)
    net = training.network(case)
    net.skip_nonfinite = True
    run = train(case, net)
    assert run is not None and differences(run, plain(case)) == {}


def test_every_gradient_is_finished_once() -> None:
    """``Finishing`` says before the first step what a step does."""
    net = training.network(Case("mlaan", "block"))
    finishing = Finishing(net.program)
    order = [p for group in finishing.order for p in group]
    assert len(order) == len(set(order)) and set(order) == {p for p in net.parameters() if p.requires_grad}
    assert all(len({finishing.users[p] for p in group}) == 1 for group in finishing.order)


def test_buckets_divide_no_group_and_mix_no_types() -> None:
    def group(count: int, kind: torch.dtype = torch.float32) -> list[nn.Parameter]:
        return [nn.Parameter(torch.zeros(SMALLEST // 8, dtype=kind)) for _ in range(count)]

    order = [group(1), group(1), group(5), group(1), group(1, torch.float64), group(2)]
    assert [len(bucket) for bucket in filled(order)] == [2, 5, 1, 1, 2]
    bucket = Bucket(*filled([group(2)]))
    first, second = bucket.views
    assert not bucket.add({first: torch.ones_like(first)}, 0.5, True)
    assert bucket.add({second: torch.ones_like(second)}, 0.5, True)
    assert not bucket.add({second: torch.ones_like(second)}, 0.5, False)
    assert bucket.add({first: torch.ones_like(first)}, 0.5, False)
    assert torch.equal(bucket.flat, torch.ones_like(bucket.flat))
