"""How fast a training is, how long it waits, and how much memory it takes; what its pauses take does not count."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

T = TypeVar("T")


class _Mark(NamedTuple):
    """Where a training was when a step was done: the time, and images and seconds of waiting up to then."""

    time: float
    images: int
    waited: float


class Throughput:
    """Images per second, and the share of the time waited for them: over the last steps, and over all of the run.

    The first step of every start, which pays for compilation, caches and the filling of the loader's queues, is left
    out.

    Args:
        images: those that earlier starts of the run timed.
        seconds: the time that they took.
        window: steps that count as the last ones.
        clock: seconds since whenever.
        waited: seconds of them that were spent waiting.

    Attributes:
        images: timed so far.
        seconds: that they took.
        waited: seconds of them that were spent in ``waiting``.
    """

    def __init__(
        self,
        images: int = 0,
        seconds: float = 0.0,
        window: int = 20,
        clock: Callable[[], float] = time.perf_counter,
        waited: float = 0.0,
    ) -> None:
        self.images, self.seconds, self.waited = images, seconds, waited
        self._clock, self._paused, self._waiting = clock, 0.0, 0.0
        self._recent: deque[_Mark] = deque(maxlen=window + 1)

    def step(self, images: int) -> float:
        """Note that ``images`` more are done; the rate over the last ``window`` steps, 0 after the first."""
        now, seen = self._clock() - self._paused, 0
        if self._recent:
            before = self._recent[-1]
            seen = before.images
            self.images += images
            self.seconds += now - before.time
            self.waited += self._waiting - before.waited
        self._recent.append(_Mark(now, seen + images, self._waiting))
        first, last = self._recent[0], self._recent[-1]
        return _ratio(last.images - first.images, last.time - first.time)

    def waiting(self, items: Iterable[T]) -> Iterator[T]:
        """The items; the time until each is there counts as waited."""
        iterator = iter(items)
        while True:
            start = self._clock()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self._waiting += self._clock() - start
            yield item

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time that the block takes does not count."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - start

    @property
    def mean(self) -> float:
        """The rate over all timed images; 0 if there are none."""
        return _ratio(self.images, self.seconds)

    @property
    def waited_lately(self) -> float:
        """Share of the time of the last steps that was spent waiting, between 0 and 1."""
        first, last = (
            (self._recent[0], self._recent[-1]) if self._recent else (_Mark(0, 0, 0), _Mark(0, 0, 0))
        )
        return _ratio(last.waited - first.waited, last.time - first.time)

    @property
    def mean_waited(self) -> float:
        """The same of all timed steps."""
        return _ratio(self.waited, self.seconds)


def _ratio(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0


class PeakMemory:
    """The largest memory of a training: that of tensors on a GPU, what the process held in RAM on a CPU.

    Args:
        device: where the training runs.
        largest: bytes that an earlier start of the run has held.

    Attributes:
        bytes: the largest of all steps so far.
    """

    def __init__(self, device: torch.device, largest: int = 0) -> None:
        self.bytes, self._device = largest, device
        _reset(device)

    def step(self) -> None:
        """Note that a step is done."""
        self.bytes = max(self.bytes, _peak(self._device))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Memory that the block takes and gives back does not count. (On a CPU outside Linux it does.)"""
        try:
            yield
        finally:
            _reset(self._device)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        if found := re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text()):
            return 1024 * int(found[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes on macOS, KiB elsewhere


def _reset(device: torch.device) -> None:
    """The largest memory from now on is what is held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            _CLEAR.write_text("5")  # Linux, proc(5)
