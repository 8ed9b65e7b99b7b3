"""One start at a time in the folder of a run, on file servers too; an earlier one that lives on learns of a later.

Every start creates the next of the files ``lock/start-00000001.json``, ``-00000002`` ... exclusively, which file
servers do as well, and touches it while it lasts. The newest holds the folder, unless it has ended or is dead.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from framework.runtime import distributed, watchdog
from framework.runtime.errors import LocalError, UserError
from framework.runtime.files import unlocked, write_whole
from framework.runtime.slurm_jobs import has_ended

FOLDER = "lock"
BEAT = 5.0  # seconds between two touches
REMEDY = "set another run_dir"
DEAD = 60.0  # seconds without one after which a start on another machine is dead
_NAME = re.compile(r"start-(\d{8,})\.json")


@dataclass(frozen=True)
class Holder:
    """A start of a run, as others learn of it.

    Attributes:
        host: name of its machine, for people.
        machine: boot and process namespace, in which ``pid`` means something.
        pid: process of rank 0.
        born: when that process began, in clock ticks since the boot; a later process may get its number.
        job: of Slurm, with the cluster's name; empty without Slurm.
        restarts: how often Slurm had started that job again.
        since: date and time.
        ended: it has left the folder to others.
    """

    host: str
    machine: str
    pid: int
    born: int
    job: str
    restarts: int
    since: str
    ended: bool = False

    @classmethod
    def this(cls) -> Holder:
        """This process."""
        job = "/".join(os.environ.get(name, "") for name in ("SLURM_CLUSTER_NAME", "SLURM_JOB_ID")).strip("/")
        return cls(
            socket.gethostname(),
            _machine(),
            os.getpid(),
            _born("self") or 0,
            job if "SLURM_JOB_ID" in os.environ else "",
            int(os.environ.get("SLURM_RESTART_COUNT") or 0),
            datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"

    def comes_after(self, other: Holder) -> bool:
        """Whether Slurm started this job again after it had given ``other`` up, which may live on on a lost node."""
        return self.job != "" and self.job == other.job and self.restarts > other.restarts

    def outlived(self, other: Holder) -> bool:
        """Whether ``other`` is of another job of this cluster that is over for Slurm; it may live on on a lost node."""
        cluster, _, number = other.job.rpartition("/")
        return self.job.rpartition("/")[0] == cluster and self.job != other.job != "" and has_ended(number)


class RunLock:
    """The place of this start among those of a run.

    Args:
        folder: of the locks.
        number: of this start.
        holder: this process.
    """

    def __init__(self, folder: Path, number: int, holder: Holder) -> None:
        self._folder, self._number, self._holder = folder, number, holder
        self._text = json.dumps(asdict(holder))
        self._path = _path(folder, number)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """To be called before each write into the folder: whether this is still its newest start.

        Raises:
            LocalError: a later one has the folder, or somebody has deleted the lock.
            UserError: the file system fails, so that nobody can say.
        """
        try:
            newest = _newest(self._folder)
            mine = newest == self._number and self._path.read_text() == self._text
        except FileNotFoundError:
            newest, mine = 0, False
        except OSError as error:
            raise UserError(f"{self._folder}: can't be read: {error.strerror}") from error
        if newest > self._number:
            raise LocalError(
                f"{self._folder.parent}: start {newest} of this run has taken over from this one, start "
                f"{self._number} ({self._holder}), which ends and writes nothing more"
            )
        if not mine:
            raise LocalError(
                f"{self._path}: somebody has deleted it; this start ends and writes nothing more"
            )

    def release(self) -> None:
        """Leave the folder to the next start; a folder without anything else disappears."""
        self._over.set()
        self._thread.join()
        with suppress(UserError, OSError):  # who can't say so is found dead
            self.check()
            if os.listdir(self._folder.parent) == [FOLDER]:
                self._path.unlink()
                self._folder.rmdir()
                self._folder.parent.rmdir()
            else:
                write_whole(self._path, json.dumps(asdict(replace(self._holder, ended=True))))

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            with suppress(OSError):  # a file server that is away may come back
                os.utime(self._path)


@contextmanager
def held(run_dir: Path, remedy: str = REMEDY) -> Iterator[Callable[[], None]]:
    """Inside, the folder of a run is that of these ranks; it is made if there is none. Collective.

    The start before this one may be alive for all that anybody knows, if it was on another machine; then this waits
    for it to be heard of, or to be silent for ``DEAD`` seconds.

    Args:
        run_dir: the folder.
        remedy: what somebody can do who finds it taken.

    Returns:
        ``RunLock.check`` on rank 0, which writes; nothing to check elsewhere.

    Raises:
        UserError: another start has it, which is named; the folder can't be written.
    """
    lock: RunLock | None = None
    with distributed.same_outcome():
        if distributed.is_main():
            lock = take(run_dir, remedy)
    try:
        yield lock.check if lock else unlocked
    finally:
        if lock:
            lock.release()


def take(run_dir: Path, remedy: str = REMEDY) -> RunLock:
    """``held`` for one process, which has to ``release`` it.

    Raises:
        UserError: as there.
    """
    folder = run_dir / FOLDER
    try:
        return _taken(folder, remedy)
    except OSError as error:
        raise UserError(f"{folder}: can't be written: {error.strerror}") from error


def _taken(folder: Path, remedy: str) -> RunLock:
    folder.mkdir(parents=True, exist_ok=True)
    me = Holder.this()
    while True:
        newest = _newest(folder)
        if newest:
            _await_end(folder, newest, me, remedy)
        path = _path(folder, newest + 1)
        with suppress(FileExistsError), path.open("x") as file:
            file.write(json.dumps(asdict(me)))
            break
    for name in os.listdir(folder):
        if (found := _NAME.fullmatch(name)) and int(found[1]) <= newest:
            (folder / name).unlink(missing_ok=True)
    return RunLock(folder, newest + 1, me)


def _await_end(folder: Path, number: int, me: Holder, remedy: str) -> None:
    """Return when start ``number`` has ended or is dead.

    Raises:
        UserError: it is alive.
    """
    first: int | None = None
    while True:
        try:
            holder, beat = _read(_path(folder, number))
        except FileNotFoundError:  # a third start has taken over from it
            return
        except ValueError:  # just being written, or by a process that was killed over it
            holder, beat = None, _beat_of(_path(folder, number))
        silent = _now(folder) - beat
        if holder is not None:
            if holder.ended or me.comes_after(holder):
                return
            alive = holder.machine == me.machine and _born(holder.pid) == holder.born
            if alive or first not in (None, beat):
                if me.outlived(holder):
                    return
                raise UserError(
                    f"{folder.parent}: is the folder of a run that is going on: {holder}; let it end, or {remedy} "
                    f"(if it is dead after all, delete {folder})"
                )
            if holder.machine == me.machine:
                return
        if silent > DEAD * 1e9:
            return
        if first is None:
            first = beat
            left = DEAD - silent / 1e9
            who = holder or f"the one that wrote {_path(folder, number)}"
            print(
                f"waiting for at most {left:.0f} s to see whether {who}, is alive",
                file=sys.stderr,
                flush=True,
            )
        watchdog.sign()
        time.sleep(min(1.0, DEAD / 10))


def _path(folder: Path, number: int) -> Path:
    return folder / f"start-{number:08d}.json"


def _newest(folder: Path) -> int:
    """The number of the newest start, 0 if there is none. NFS looks again when a folder is opened, not at a name."""
    return max((int(found[1]) for name in os.listdir(folder) if (found := _NAME.fullmatch(name))), default=0)


def _read(path: Path) -> tuple[Holder, int]:
    """A start, and when it was last heard of. NFS looks again when a file is opened.

    Raises:
        OSError: it can't be read.
        ValueError: it is not whole.
    """
    with path.open() as file:
        text, beat = file.read(), os.fstat(file.fileno()).st_mtime_ns
    try:
        return Holder(**json.loads(text)), beat
    except TypeError as error:
        raise ValueError(str(error)) from error


def _beat_of(path: Path) -> int:
    with suppress(FileNotFoundError), path.open() as file:
        return os.fstat(file.fileno()).st_mtime_ns
    return 0


def _now(folder: Path) -> int:
    """The time by the clock of the file server, which is also that of the beats, in ns."""
    probe = folder / f".now-{uuid4().hex[:8]}"
    try:
        with probe.open("x") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    finally:
        probe.unlink(missing_ok=True)


def _machine() -> str:
    """The kernel and its process namespace: containers of one machine have several."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"


def _born(pid: int | str) -> int | None:
    """Start time of a process in clock ticks since the boot; ``None`` of one that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
