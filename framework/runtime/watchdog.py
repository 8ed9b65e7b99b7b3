"""Ends ranks that hang, after writing their stacks to a file, so that the job can start again."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import Protocol

from framework.runtime.exit_status import EXIT_TRY_AGAIN
from framework.runtime.launch import launched_rank

PACKAGE = str(Path(__file__).parents[1])
OTHER_RANKS = 5.0  # seconds for the other ranks, which wait for this one, to write their reports too


class Others(Protocol):
    """The other ranks.

    Attributes:
        signs: how often this rank got on, which they are told.
    """

    signs: int

    @property
    def heard(self) -> int:
        """A number that grows while any rank gets on."""


class Watchdog:
    """Ends this process when no rank has got on for too long. Inside ``with``, this module's functions tell it.

    Every rank watches itself: when one hangs, all others wait in a collective, and the reports of all show which one is
    elsewhere. A rank that leaves no report was stopped, or its machine is gone. A rank that waits while another one
    gets on, such as rank 0 with an index, does not hang.

    Args:
        run_dir: gets ``hang-rank00000.txt`` with the stacks of all threads; without one they are printed.
        limit: seconds.
    """

    def __init__(self, run_dir: Path | None, limit: float) -> None:
        self.run_dir, self.limit = run_dir, limit
        self._over = threading.Event()
        self._done, self._signs, self._working, self._doing = 0, 0, False, ""
        self._others: Others | None = None
        self._watched = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._outer = _CURRENT.set(self)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()
        _CURRENT.reset(self._outer)

    def hear(self, others: Others) -> None:
        """From now on count what other ranks do, and tell them what this one does."""
        self._others = others

    def step(self, done: int) -> None:
        """Note that so many steps are done."""
        self._done, self._signs = done, self._signs + 1

    def sign(self) -> None:
        """Note that this rank gets on."""
        self._signs += 1

    @contextmanager
    def during(self, doing: str) -> Iterator[None]:
        """Inside, no step is expected; reports say "while ``doing``"."""
        before, self._doing = self._doing, doing
        self.sign()
        try:
            yield
        finally:
            self._doing = before
            self.sign()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """See the function of that name."""
        self._working = True
        try:
            yield
        finally:
            self._working = False
            self.sign()

    def _watch(self) -> None:
        tick, last, seen, silent = min(1.0, self.limit / 10), time.monotonic(), 0, 0.0
        while not self._over.wait(tick):
            self._signs += self._working
            signs = self._signs
            if self._others is not None:
                self._others.signs = signs
                signs += self._others.heard
            now = time.monotonic()
            # A process that was suspended (SIGSTOP, scontrol suspend) has not hung: a long tick counts as two.
            silent = silent + min(now - last, 2 * tick) if signs == seen else 0.0
            last, seen = now, signs
            if silent > self.limit:
                self._report()
                time.sleep(OTHER_RANKS)
                os._exit(EXIT_TRY_AGAIN)

    def _report(self) -> None:
        frame = sys._current_frames().get(self._watched)
        where = f"rank {launched_rank()} on {socket.gethostname()}"
        what = f"no sign of any rank for {self.limit:g} s while {self._doing}"
        if not self._doing:
            what = f"no step for {self.limit:g} s after step {self._done}"
        line = f"{where}: {what} (faults.hang_seconds): {place(frame)}"
        print(line, file=sys.stderr, flush=True)
        if self.run_dir is None:
            faulthandler.dump_traceback()
            return
        path = self.run_dir / f"hang-rank{launched_rank():05d}.txt"
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                print(line, file=file, flush=True)
                faulthandler.dump_traceback(file)
        except OSError as error:  # the disk may be what hangs or is full
            print(f"{path}: can't be written: {error}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback()


_CURRENT: ContextVar[Watchdog | None] = ContextVar("watchdog", default=None)


def sign() -> None:
    """Note that this rank gets on, where it makes no step: an image scored, a shard indexed."""
    if (current := _CURRENT.get()) is not None:
        current.sign()


def step(done: int) -> None:
    """Note that so many steps are done."""
    if (current := _CURRENT.get()) is not None:
        current.step(done)


def during(doing: str) -> AbstractContextManager[None]:
    """Inside, no step is expected; reports say "while ``doing``"."""
    current = _CURRENT.get()
    return nullcontext() if current is None else current.during(doing)


def at_work() -> AbstractContextManager[None]:
    """Inside, this process computes without waiting for anything, however long: all the time it gets on."""
    current = _CURRENT.get()
    return nullcontext() if current is None else current.at_work()


def place(frame: FrameType | None) -> str:
    """The innermost function of a stack, in a line; the lock file, if it waits for the build of an extension.

    PyTorch builds extensions under a lock file. A build that is killed leaves the file, and later builds wait for ever.
    """
    stack = list(traceback.walk_stack(frame))
    if not stack:
        return "its main thread has ended"
    for caller, _ in stack:
        if Path(caller.f_code.co_filename).name == "file_baton.py":
            lock = caller.f_locals["self"].lock_file_path
            return (
                f"waits for the lock {lock} of an extension's build; if nobody builds, a killed build has left it: "
                "delete it, or set TORCH_EXTENSIONS_DIR to a new folder"
            )
    ours = [entry for entry in stack if entry[0].f_code.co_filename.startswith(PACKAGE)]
    inner = _named(*stack[0])
    return f"in {inner}" if not ours or ours[0] is stack[0] else f"in {inner}, called from {_named(*ours[0])}"


def _named(frame: FrameType, line: int) -> str:
    parts = Path(frame.f_code.co_filename).parts
    return f"{frame.f_code.co_name} ({'/'.join(parts[-2:])}:{line})"
