"""Two starts in one run folder: who gets it, who is told, and how one that was given up learns of it."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from framework.runtime import run_lock
from framework.runtime.errors import LocalError, UserError
from framework.runtime.run_lock import RunLock, take
from tests.support.forked import Forked
from tests.support.holder import Start, holds
from tests.support.pool import CONTEXT
from tests.support.waiting import until

CLONE_NEWPID = 0x20000000
pytestmark = pytest.mark.usefixtures("pool")  # its server forks the processes


def holds_in_a_container(folder: Path, connection: Connection) -> None:
    """In a process namespace of its own, in which no number of a process means anything outside."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWPID):
        raise OSError(ctypes.get_errno(), "unshare")
    child = os.fork()
    if not child:
        holds(folder, connection, {})
        os._exit(0)
    connection.send(child)
    os.waitpid(child, 0)


def taken(folder: Path) -> None:
    """Take the folder, leave something there, and leave it."""
    lock = take(folder)
    lock.check()
    (folder / "result.json").touch()
    lock.release()


def test_who_has_the_folder_is_named_and_its_end_frees_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with Start(folder, SLURM_JOB_ID="4711", SLURM_CLUSTER_NAME="big") as first:
        with pytest.raises(UserError) as refused:
            take(folder)
        who = f"process {first.process.pid} on {socket.gethostname()}, Slurm job big/4711, since 20"
        assert f"{folder}: is the folder of a run that is going on: {who}" in str(refused.value)
        assert "\n" not in str(refused.value) and not refused.value.transient
        assert first.writes() == "written"
        first.ends()
    taken(folder)
    assert os.listdir(folder / "lock") == ["start-00000002.json"]


def test_the_dead_are_told_from_those_with_their_number(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with Start(folder) as first:
        first.process.signal(signal.SIGKILL)
        first.process.status()
        taken(folder)
    path = folder / "lock" / "start-00000002.json"
    ours = json.loads(path.read_text())
    assert ours["pid"] == os.getpid()
    path.write_text(json.dumps({**ours, "ended": False, "born": ours["born"] - 1}))  # another had the number
    taken(folder)
    last = folder / "lock" / "start-00000003.json"
    last.write_text(json.dumps({**ours, "ended": False}))
    with pytest.raises(UserError, match="that is going on"):
        take(folder)


def test_a_job_that_slurm_started_again_takes_over_and_the_earlier_start_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its node was lost, says Slurm; it lives on, and has no other way to know."""
    folder = tmp_path / "run"
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with Start(folder, SLURM_JOB_ID="4711", SLURM_RESTART_COUNT="0") as first:
        with pytest.raises(UserError, match="Slurm job 4711"):
            take(folder)
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        lock = take(folder)
        said = first.writes()
        assert said.startswith(
            f"LocalError: {folder}: start 2 of this run has taken over from this one, start 1 ("
        )
        first.ends()
        lock.check()
        lock.release()


def test_a_deleted_lock_ends_the_start(tmp_path: Path) -> None:
    lock = take(tmp_path)
    path = tmp_path / "lock" / "start-00000001.json"
    other = path.read_text().replace('"since": "2', '"since": "3')  # the first start in a folder made anew
    path.unlink()
    for _ in range(2):
        with pytest.raises(
            LocalError, match=r"start-00000001.json: somebody has deleted it; this start ends"
        ):
            lock.check()
        path.write_text(other)
    lock.release()
    assert path.read_text() == other


def test_a_start_that_leaves_nothing_leaves_no_folder(tmp_path: Path) -> None:
    take(tmp_path / "run").release()
    assert os.listdir(tmp_path) == []


def test_one_of_many_gets_the_folder(tmp_path: Path) -> None:
    def attempt(number: int) -> RunLock | None:
        with suppress(UserError):
            return take(tmp_path)
        return None

    with ThreadPoolExecutor(16) as threads:
        (winner,) = (lock for lock in threads.map(attempt, range(16)) if lock)
    winner.check()
    winner.release()


def test_half_a_lock_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "DEAD", 1.0)
    (tmp_path / "lock").mkdir()
    (tmp_path / "lock" / "start-00000007.json").touch()
    started = time.monotonic()
    taken(tmp_path)
    assert time.monotonic() - started > 0.9, "its writer may be about to write the rest"
    assert os.listdir(tmp_path / "lock") == ["start-00000008.json"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make a process namespace")
def is_stopped(pid: int) -> bool:
    """Whether all threads of a process have stopped; one may be in the middle of a beat when the signal is sent."""
    states = [
        path.read_text().rpartition(")")[2].split()[0] for path in Path(f"/proc/{pid}/task").glob("*/stat")
    ]
    return set(states) == {"T"}


def test_on_another_machine_only_silence_is_death(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A container is one: the numbers of its processes mean nothing here."""
    monkeypatch.setattr(run_lock, "DEAD", 3.0)
    folder = tmp_path / "run"
    connection, theirs = CONTEXT.Pipe()
    with Forked(tmp_path / "first", holds_in_a_container, folder, theirs):
        child = connection.recv()
        assert connection.recv() == "taken"
        with pytest.raises(UserError, match="that is going on: process 1 on"):
            take(folder)
        assert "to see whether process 1 on" in capfd.readouterr().err
        os.kill(child, signal.SIGSTOP)
        until(lambda: is_stopped(child))
        lock = take(folder)
        os.kill(child, signal.SIGCONT)
        connection.send(True)
        assert "start 2 of this run has taken over" in connection.recv()
        connection.send(False)
        until(lambda: not Path(f"/proc/{child}").exists())
        lock.check()
        lock.release()
        assert [path.name for path in (folder / "lock").iterdir()] == ["start-00000002.json"]
