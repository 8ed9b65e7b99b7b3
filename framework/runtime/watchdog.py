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
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from framework.runtime.exit_status import EXIT_TRY_AGAIN
from framework.runtime.launch import launched_rank

PACKAGE = str(Path(__file__).parents[1])
OTHER_RANKS = 5.0  # seconds for the other ranks, which wait for this one, to write their reports too


class Watchdog:
    """Ends this process when it makes no step for too long. Inside ``with``, call ``step`` after each.

    Every rank watches itself: when one hangs, all others wait in a collective, and the reports of all show which one is
    elsewhere. A rank that leaves no report was stopped, or its machine is gone.

    Args:
        run_dir: gets ``hang-rank00000.txt`` with the stacks of all threads.
        limit: seconds.
    """

    def __init__(self, run_dir: Path, limit: float) -> None:
        self._run_dir, self._limit = run_dir, limit
        self._over = threading.Event()
        self._done, self._signs, self._awake = 0, 0, True
        self._watched = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def step(self, done: int) -> None:
        """Note that so many steps are done."""
        self._done, self._signs = done, self._signs + 1

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """Don't watch inside, where no step is made for long, as in scoring a large split."""
        self._awake = False
        try:
            yield
        finally:
            self._signs, self._awake = self._signs + 1, True

    def _watch(self) -> None:
        tick, last, seen, silent = min(1.0, self._limit / 10), time.monotonic(), 0, 0.0
        while not self._over.wait(tick):
            now, signs = time.monotonic(), self._signs
            # A process that was suspended (SIGSTOP, scontrol suspend) has not hung: a long tick counts as two.
            silent = silent + min(now - last, 2 * tick) if self._awake and signs == seen else 0.0
            last, seen = now, signs
            if silent > self._limit:
                self._report()
                time.sleep(OTHER_RANKS)
                os._exit(EXIT_TRY_AGAIN)

    def _report(self) -> None:
        frame = sys._current_frames().get(self._watched)
        where = f"rank {launched_rank()} on {socket.gethostname()}"
        line = f"{where}: no step for {self._limit:g} s after step {self._done} (faults.hang_seconds): {place(frame)}"
        print(line, file=sys.stderr, flush=True)
        path = self._run_dir / f"hang-rank{launched_rank():05d}.txt"
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                print(line, file=file, flush=True)
                faulthandler.dump_traceback(file)
        except OSError as error:  # the disk may be what hangs or is full
            print(f"{path}: can't be written: {error}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback()


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
