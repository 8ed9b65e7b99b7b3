"""Processes of their own that cost no start: forks of the pool's server, which has imported everything."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.commands import run_tool
from tests.support.pool import CONTEXT

STREAMS = ("stdout", "stderr")


class Forked:
    """A process that calls ``function(*arguments)``, to be used with ``with``, which ends it.

    Args:
        folder: gets ``stdout`` and ``stderr``, what it prints.
        function: pickled by its name; what it returns is the exit status.
    """

    def __init__(self, folder: Path, function: Callable[..., Any], *arguments: Any) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        for name in STREAMS:
            (folder / name).touch()
        self.process = CONTEXT.Process(target=_run, args=(folder, function, arguments))

    def __enter__(self) -> Forked:
        self.process.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.join()

    @property
    def pid(self) -> int:
        """Its number."""
        assert self.process.pid is not None
        return self.process.pid

    def signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def status(self) -> int | None:
        """Wait for its end; the exit status, minus its number if it was a signal."""
        self.process.join()
        return self.process.exitcode

    @property
    def stdout(self) -> str:
        """What it printed so far."""
        return (self._folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        """What it printed so far."""
        return (self._folder / "stderr").read_text()


def forked_tool(folder: Path, name: str, *arguments: object) -> Forked:
    """A command of ``tools``."""
    return Forked(folder, run_tool, name, *map(str, arguments))


def _run(folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch

    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for number, name in enumerate(STREAMS, start=1):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_TRUNC), number)
    torch.set_num_threads(1)
    gc.freeze()
    # That of a process which users start, in place of the one by which this one came about.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    sys.exit(function(*arguments))
