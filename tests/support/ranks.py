"""Ranks as a launcher starts them: processes of their own that may be killed, stopped, signaled and poisoned."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from framework.runtime.errors import UserError
from framework.runtime.launch import LAUNCH_VARIABLES
from tests.support.pool import CONTEXT
from tests.support.ports import free_port
from tests.support.waiting import PATIENCE

CLONE_NEWNS = 0x20000


@dataclass(frozen=True)
class Trouble:
    """What is to happen to one rank of a start.

    Attributes:
        rank: which.
        at_step: the step in which ``poison``, ``sleep`` or ``lock`` happens.
        kind: "kill" ends the process when it touches a file: on the ``count``-th audit event ``event`` of the
            interpreter whose first argument ends in ``path``. "poison" turns the images into NaN, "sleep" never
            comes back, "lock" waits for the file ``path`` as PyTorch's builds do, "refuse" is an
            error in the data. "full disk" lets no file grow beyond 1000 bytes. "small shm" has a /dev/shm of 1 MiB.
    """

    rank: int
    kind: str
    at_step: int = -1
    event: str = ""
    path: str = ""
    count: int = 1


class Ranks:
    """One start of a recipe on ``world`` ranks; every rank writes down the samples of its steps.

    Args:
        argv: of ``framework/train.py``.
        world: how many.
        record: folder for the samples and for what the ranks print.
        trouble: if any.
        variables: added to their environment.
        enter: called by each rank with its number before anything else.
    """

    def __init__(
        self,
        argv: list[str],
        world: int,
        record: Path,
        trouble: Trouble | None = None,
        variables: dict[str, str] | None = None,
        enter: Callable[[int], None] | None = None,
    ) -> None:
        record.mkdir(parents=True, exist_ok=True)
        port = free_port()
        self.record = record
        self.processes = [
            CONTEXT.Process(
                target=_rank, args=(argv, rank, world, port, record, trouble, variables or {}, enter)
            )
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()

    def signal(self, number: int, rank: int) -> None:
        """Send one rank a signal."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def until(self, condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
        """Wait for something while the ranks run."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline and self.running, self.printed
            time.sleep(0.005)

    @property
    def running(self) -> bool:
        """Whether any rank lives."""
        return any(process.is_alive() for process in self.processes)

    def first_end(self, seconds: float = PATIENCE) -> None:
        """Wait until a rank has ended, for whatever reason."""
        assert wait([process.sentinel for process in self.processes], seconds), self.printed

    def statuses(self, seconds: float = PATIENCE) -> list[int | None]:
        """Wait for all; their exit statuses, negative ones of signals."""
        for process in self.processes:
            process.join(seconds)
        return [process.exitcode for process in self.processes]

    def end(self) -> None:
        """Kill what still lives, as srun does when a rank has died."""
        for process in self.processes:
            process.kill()
            process.join()

    @property
    def printed(self) -> str:
        """What the ranks printed, in this start and earlier ones."""
        return "".join(file.read_text() for file in sorted(self.record.glob("printed-*")))


def small_shm(size: str) -> None:
    """Give this process a small /dev/shm of its own; the machine's stays as it is. Root may."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", "/dev/shm"], check=True)


def samples(record: Path) -> dict[tuple[int, int], list[int]]:
    """(rank, step) -> the samples that it took, which must be the same at every start."""
    found: dict[tuple[int, int], list[int]] = {}
    for file in record.glob("samples-*"):
        for line in file.read_text().splitlines():
            rank, step, ids = json.loads(line)
            assert found.setdefault((rank, step), ids) == ids, (rank, step)
    return found


def _rank(
    argv: list[str],
    rank: int,
    world: int,
    port: int,
    record: Path,
    trouble: Trouble | None,
    variables: dict[str, str],
    enter: Callable[[int], None] | None,
) -> None:
    import torch

    from framework import train

    output = os.open(record / f"printed-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    values = (rank, world, rank, "127.0.0.1", port)
    os.environ.update(zip(LAUNCH_VARIABLES, map(str, values), strict=True))
    os.environ.update(variables)
    if enter is not None:
        enter(rank)
    torch.set_num_threads(1)
    gc.freeze()  # a collection need not walk through all that was imported
    logging.getLogger().handlers.clear()
    mine = trouble if trouble is not None and trouble.rank == rank else None
    _record_samples(record / f"samples-{rank}", rank, mine)
    if mine and mine.kind == "kill":
        sys.addaudithook(_Killer(mine))
    if mine and mine.kind == "full disk":
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    if mine and mine.kind == "small shm":
        small_shm("1m")
    sys.exit(train.main(argv))


class _Killer:
    def __init__(self, trouble: Trouble) -> None:
        self.trouble, self.left = trouble, trouble.count

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == self.trouble.event and str(arguments[0]).endswith(self.trouble.path):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def _record_samples(path: Path, rank: int, trouble: Trouble | None) -> None:
    """Write down what every step of this process takes, and bring its trouble about there."""
    from framework.data.loading.loader import TrainLoader

    steps, batch = TrainLoader.steps, TrainLoader._batch

    def recorded_steps(self: Any, start: int, stop: int) -> Any:
        self.at = start
        return steps(self, start, stop)

    def recorded_batch(self: Any, drawn: Any, images: Any, *place: int) -> Any:
        # A full disk is the run's trouble, not that of who looks on.
        with contextlib.suppress(OSError), path.open("a") as file:
            file.write(json.dumps([rank, self.at, drawn.samples.tolist()]) + "\n")
        if trouble is not None and self.at == trouble.at_step:
            images = _HAPPENS[trouble.kind](images, trouble.path)
        self.at += 1
        return batch(self, drawn, images, *place)

    TrainLoader.steps, TrainLoader._batch = recorded_steps, recorded_batch  # type: ignore[method-assign]


def _wait_for_lock(images: Any, path: str) -> Any:
    from torch.utils.file_baton import FileBaton

    FileBaton(path).wait()
    return images


def _refuse(images: Any, path: str) -> Any:
    raise UserError("these images are no good")


_HAPPENS: dict[str, Callable[[Any, str], Any]] = {
    "poison": lambda images, path: images * float("nan"),
    "sleep": lambda images, path: time.sleep(600),
    "lock": _wait_for_lock,
    "refuse": _refuse,
}
