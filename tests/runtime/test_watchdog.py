"""The watchdog in a process of its own; in training it is part of the tests of faults."""

from __future__ import annotations

import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from framework.runtime import watchdog
from framework.runtime.exit_status import EXIT_TRY_AGAIN
from tests.support.forked import Forked
from tests.support.pool import CONTEXT
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("pool")  # its server forks the processes

LIMIT = 1.0  # seconds


def scores_then_hangs(folder: Path) -> None:
    watchdog.OTHER_RANKS = 0.0  # there are none
    with watchdog.Watchdog(folder, LIMIT) as dog:
        dog.step(7)
        with dog.asleep():
            time.sleep(3 * LIMIT)
        print("scored", flush=True)
        time.sleep(600)


def test_a_score_may_take_longer_than_a_step(tmp_path: Path) -> None:
    with Forked(tmp_path, scores_then_hangs, tmp_path) as forked:
        assert forked.status() == EXIT_TRY_AGAIN
    assert forked.stdout == "scored\n"
    assert f"no step for {LIMIT:g} s after step 7" in forked.stderr


def steps_until_told_to_stop(folder: Path, connection: Connection) -> None:
    with watchdog.Watchdog(folder, LIMIT) as dog:
        connection.send("started")
        step = 0
        while not connection.poll(LIMIT / 20):
            step += 1
            dog.step(step)


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_who_is_suspended_does_not_hang(tmp_path: Path) -> None:
    ours, theirs = CONTEXT.Pipe()
    with Forked(tmp_path, steps_until_told_to_stop, tmp_path, theirs) as forked:
        assert ours.recv() == "started"
        forked.signal(signal.SIGSTOP)
        until(lambda: is_stopped(forked.pid))
        time.sleep(3 * LIMIT)  # longer does no harm
        forked.signal(signal.SIGCONT)
        ours.send("stop")
        assert (forked.status(), forked.stderr) == (0, "")
