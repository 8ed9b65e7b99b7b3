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
from tests.support.marks import slow
from tests.support.pool import CONTEXT
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("pool")  # its server forks the processes

LIMIT = 1.0  # seconds


def scores_then_hangs(folder: Path, scoring: bool) -> None:
    watchdog.OTHER_RANKS = 0.0  # there are none
    with watchdog.Watchdog(folder, LIMIT):
        watchdog.step(7)
        with watchdog.during("scoring"):
            for _ in range(30):
                time.sleep(LIMIT / 10)
                watchdog.sign()
            with watchdog.at_work():  # in a call that can't give signs
                time.sleep(3 * LIMIT)
            print("scored", flush=True)
            if scoring:
                time.sleep(600)
        time.sleep(600)


@pytest.mark.parametrize("scoring", slow([False, True]))
def test_a_score_may_take_longer_than_a_step_and_is_watched(tmp_path: Path, scoring: bool) -> None:
    with Forked(tmp_path, scores_then_hangs, tmp_path, scoring) as forked:
        assert forked.status() == EXIT_TRY_AGAIN
    assert forked.stdout == "scored\n"
    what = "sign of any rank for 1 s while scoring" if scoring else "step for 1 s after step 7"
    assert f"no {what} (faults.hang_seconds): in scores_then_hangs" in forked.stderr


def steps_until_told_to_stop(folder: Path, connection: Connection) -> None:
    with watchdog.Watchdog(folder, LIMIT):
        connection.send("started")
        step = 0
        while not connection.poll(LIMIT / 20):
            step += 1
            watchdog.step(step)


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
