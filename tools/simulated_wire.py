"""The time of a step on a network between ranks, worked out from when its gradients are finished and needed."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from torch import Tensor

from framework.engines.host_copy import Pending


class Event(NamedTuple):
    """A moment of a step without communication.

    Attributes:
        at: seconds after the step's start.
        sends: whether a tensor leaves; else it is needed, having left in the step before.
        number: of the tensor, counted as they leave.
        bytes: its size.
    """

    at: float
    sends: bool
    number: int
    bytes: int


class Recorder:
    """A ``Wire`` to nobody that notes a step's events.

    Attributes:
        events: since ``begin``.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._start, self._count = time.perf_counter(), 0

    def begin(self) -> None:
        """A step begins."""
        self.events, self._start, self._count = [], time.perf_counter(), 0

    def sum(self, x: Tensor) -> Pending:
        """See ``Wire``."""
        number, size = self._count, x.numel() * x.element_size()
        self._count += 1
        self.events.append(Event(time.perf_counter() - self._start, True, number, size))
        return _Needed(self, number)

    def close(self) -> None:
        """See ``Wire``."""

    def needed(self, number: int) -> None:
        """A tensor of the step before is needed now."""
        self.events.append(Event(time.perf_counter() - self._start, False, number, 0))


class _Needed:
    def __init__(self, recorder: Recorder, number: int) -> None:
        self._recorder, self._number = recorder, number

    def wait(self) -> None:
        """Note it."""
        self._recorder.needed(self._number)


class Step(NamedTuple):
    """A step without communication: how long it takes, and its events in order."""

    seconds: float
    events: list[Event]

    def at_speed(self, factor: float) -> Step:
        """The same on a device that is so many times as fast."""
        return Step(self.seconds / factor, [e._replace(at=e.at / factor) for e in self.events])


def ring(ranks: int, gbit: float) -> float:
    """Bytes of a tensor that an all-reduce over a ring sums in a second.

    Args:
        ranks: in the ring; each sends 2 (ranks - 1) / ranks times the tensor.
        gbit: that a rank's link carries in a second.
    """
    return gbit * 1e9 / 8 / (2 * (ranks - 1) / ranks)


def step_seconds(step: Step, rate: float, late: bool, overlap: bool = True) -> float:
    """Seconds from one step to the next, many steps after the first.

    Tensors travel one after the other, in the order in which they leave.

    Args:
        step: what is computed.
        rate: bytes of a tensor that are summed in a second.
        late: whether a tensor is waited for when the next step needs it, or at the end of its own step.
        overlap: whether tensors leave when they are finished, or at the end of the step.
    """
    now, free, arrivals, before = 0.0, 0.0, dict[int, float](), 0.0
    for _ in range(4):
        before, delay = now, 0.0
        arriving: dict[int, float] = {}
        for event in step.events:
            here = before + event.at + delay
            if event.sends:
                free = max(free, here if overlap else before + step.seconds + delay) + event.bytes / rate
                arriving[event.number] = free
            elif late:
                delay += max(0.0, arrivals.get(event.number, 0.0) - here)
        now = before + step.seconds + delay
        if not late:
            now = max(now, *arriving.values())
        arrivals = arriving
    return now - before


def rows(steps: dict[str, Step], ranks: int, gbits: list[float]) -> list[dict[str, Any]]:
    """For every method and network: the efficiency of ``ranks`` ranks, 1 being that nothing is ever waited for."""
    found: list[dict[str, Any]] = []
    for gbit in gbits:
        rate = ring(ranks, gbit)
        for name, step in steps.items():
            ways = {"no overlap": (False, False), "early": (False, True), "late": (True, True)}
            times = {way: step_seconds(step, rate, *flags) for way, flags in ways.items()}
            row = {way: step.seconds / took for way, took in times.items()}
            found.append({"gbit": gbit, "method": name, "seconds": step.seconds, **row})
    return found
