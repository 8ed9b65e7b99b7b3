"""How fast a training is, and how much memory it takes; what is done in its pauses counts for neither."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Throughput:
    """Images per second: over the last steps, and over all but the first of every start.

    The first step, which pays for compilation, caches and the filling of the loader's queues, is left out.

    Args:
        images: those that earlier starts of the run timed.
        seconds: the time that they took.
        window: steps that count as the last ones.
        clock: seconds since whenever.

    Attributes:
        images: timed so far.
        seconds: that they took.
    """

    def __init__(
        self,
        images: int = 0,
        seconds: float = 0.0,
        window: int = 20,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.images, self.seconds = images, seconds
        self._clock, self._paused = clock, 0.0
        self._recent: deque[tuple[float, int]] = deque(maxlen=window + 1)  # time, images up to then

    def step(self, images: int) -> float:
        """Note that ``images`` more are done; the rate over the last ``window`` steps, 0 after the first."""
        now, seen = self._clock() - self._paused, 0
        if self._recent:
            before, seen = self._recent[-1]
            self.images += images
            self.seconds += now - before
        self._recent.append((now, seen + images))
        (start, first), (end, last) = self._recent[0], self._recent[-1]
        return (last - first) / (end - start) if end > start else 0.0

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
        return self.images / self.seconds if self.seconds else 0.0


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
