"""More ranks than cores, measured as if each had a core of its own: a slower one."""

from __future__ import annotations

import os
import time
from dataclasses import replace

from framework.pipeline.scheduling.simulation import Event
from framework.pipeline.timeline import WAITING, kind_of

MARGIN = 1.5  # what ranks leave idle of the cores that they share


def slowness(ranks: int) -> float:
    """By how much slower than this machine's cores as many cores as ranks are that it can stand in for."""
    cores = len(os.sched_getaffinity(0))
    return 1.0 if ranks <= cores else MARGIN * ranks / cores


class SlowCore(list[Event]):
    """Events of a rank whose every piece of work takes ``factor`` times the processor time that it needs.

    The rank sleeps for the rest of it, and then others have the core. Messages take the time that they take.

    Args:
        factor: at 1 nothing is slowed.

    Attributes:
        overrun: seconds that work took beyond that, because the cores were busy with something else.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.overrun = 0.0
        self._factor, self._used = factor, time.thread_time()

    def append(self, event: Event) -> None:
        """The event, with the end that it has here; returns then."""
        if self._factor > 1 and kind_of(event.instruction) != WAITING:
            end = event.start + self._factor * (time.thread_time() - self._used)
            time.sleep(max(0.0, end - time.perf_counter()))
            event = replace(event, end=time.perf_counter())
            self.overrun += event.end - end
        super().append(event)
        self._used = time.thread_time()
