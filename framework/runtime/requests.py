"""Requests to a running training: signals, and files that somebody creates in the run folder."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from types import FrameType

from framework.runtime import distributed
from framework.runtime.exit_status import EXIT_TRY_AGAIN

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # preemption; Slurm's --signal before the time limit
LOOK_EVERY = 1.0  # seconds between two looks for these files, each a request to a file server


class Request(IntEnum):
    """What is asked for; a larger number is more urgent.

    ``SAVE`` (a checkpoint) and ``STOP`` (for good) are the files ``save-now`` and ``stop-now`` in the run folder.
    ``LEAVE`` is a signal: save, end, and be started again.
    """

    NOTHING = 0
    SAVE = 1
    STOP = 2
    LEAVE = 3


FILES = {Request.SAVE: "save-now", Request.STOP: "stop-now"}


def leave_at_once(*_: object) -> None:
    """Signal handler outside the training loop, where there is nothing to save."""
    print("signal received: leaving, to be started again", file=sys.stderr, flush=True)
    os._exit(EXIT_TRY_AGAIN)  # not through Python's exit, which waits for processes and threads


class Requests:
    """Inside ``with``, signals become requests. A second signal changes nothing.

    Args:
        run_dir: folder of the run.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._signaled = False
        self._looked = time.monotonic()

    def __enter__(self) -> Requests:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def on_this_rank(self) -> Request:
        """The most urgent one that this rank knows of by now; ranks agree by the most urgent of all."""
        return Request.LEAVE if self._signaled else self._touched()

    def done(self, request: Request) -> None:
        """Delete the file of a request that was carried out."""
        if distributed.is_main() and request in FILES:
            with suppress(OSError):  # a file server that is away must not end a run
                (self._run_dir / FILES[request]).unlink(missing_ok=True)

    def _touched(self) -> Request:
        if not distributed.is_main() or time.monotonic() - self._looked < LOOK_EVERY:
            return Request.NOTHING
        self._looked = time.monotonic()
        with suppress(OSError):
            found = [request for request, name in FILES.items() if (self._run_dir / name).exists()]
            return max(found, default=Request.NOTHING)
        return Request.NOTHING

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signaled = True
