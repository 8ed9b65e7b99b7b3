"""The watchdog in a process of its own; in training it is part of the tests of faults."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from framework.runtime import watchdog
from framework.runtime.exit_status import EXIT_TRY_AGAIN
from tests.support.pool import CONTEXT
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("pool")  # its server forks the processes

LIMIT = 1.0  # seconds


def scores_then_hangs(folder: Path, connection: Connection) -> None:
    with watchdog.Watchdog(folder, LIMIT) as dog:
        dog.step(7)
        with dog.asleep():
            time.sleep(3 * LIMIT)
        connection.send("scored")
        time.sleep(600)


def steps_until_told_to_stop(folder: Path, connection: Connection) -> None:
    with watchdog.Watchdog(folder, LIMIT) as dog:
        connection.send("started")
        step = 0
        while not connection.poll(LIMIT / 20):
            step += 1
            dog.step(step)


class Started:
    """A process that runs ``function(folder, connection)``; ``printed`` is its standard error."""

    def __init__(self, function: Callable[[Path, Connection], None], folder: Path) -> None:
        self.printed = folder / "stderr"
        self.connection, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(
            target=_run, args=(function, folder, theirs, self.printed), daemon=True
        )
        self.process.start()
        theirs.close()

    def status(self) -> int | None:
        self.process.join()
        return self.process.exitcode


def _run(
    function: Callable[[Path, Connection], None], folder: Path, connection: Connection, printed: Path
) -> None:
    os.dup2(os.open(printed, os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    watchdog.OTHER_RANKS = 0.0  # there are none
    function(folder, connection)


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_who_is_suspended_does_not_hang(tmp_path: Path) -> None:
    started = Started(steps_until_told_to_stop, tmp_path)
    assert started.connection.recv() == "started"
    pid = started.process.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    until(lambda: is_stopped(pid))
    time.sleep(3 * LIMIT)
    os.kill(pid, signal.SIGCONT)
    started.connection.send("stop")
    assert (started.status(), started.printed.read_text()) == (0, "")


def test_a_score_may_take_longer_than_a_step(tmp_path: Path) -> None:
    started = Started(scores_then_hangs, tmp_path)
    assert started.connection.recv() == "scored"
    assert started.status() == EXIT_TRY_AGAIN
    assert f"no step for {LIMIT:g} s after step 7" in started.printed.read_text()
