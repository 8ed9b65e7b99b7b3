"""Train the rows of a table of results, in pieces, and write down what came out.

    python tools/reproduce.py recipes/results/cifar10_r32_400ep_b1024.yaml data.path=data/cifar10 --minutes 9

Every row is trained once per seed, in a run folder of its own below ``--runs``. With ``--minutes``, or on TERM, the
runs at work save and this ends with status 75; the same command goes on from there, also after it was killed. After a
row that fails come the others, and the status is 64; one that another process trains is skipped, so that several can
share a table. Beside the table come, for every device, ``TABLE-DEVICE.csv`` with a line per finished run,
``TABLE-DEVICE.png`` with their curves, and below ``logs/`` the settings, curves and results behind each line. What that
CSV has is not trained again, wherever its run folder is, unless ``--again`` says so.

``--jobs 4`` trains four rows at a time, each on ``--threads`` threads. How long it will take is said at the start, by
the CSV and by what is begun; ``--estimate`` makes a few steps of every other row, says it and leaves.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.table import Table as Printed

from framework.runtime.command import Parser, status
from framework.runtime.errors import UserError
from framework.runtime.exit_status import EXIT_TRY_AGAIN, EXIT_USAGE, exit_status

if TYPE_CHECKING:
    from framework.analysis.results_runs import RowRun
    from framework.analysis.results_tables import ResultsTable

GRACE = 45.0  # seconds that a run may take to finish its step and save
SHORTEST = 20.0  # seconds below which no command is started
POLL = 0.5  # seconds between two looks at whether to stop


@dataclass
class Work:
    """Runs, some at a time, until the deadline.

    Attributes:
        deadline: of ``time.monotonic``.
        jobs: runs at a time.
        threads: of each; ``None`` leaves that to the environment.
        ended: called after every run that came to its end.
    """

    deadline: float
    jobs: int = 1
    threads: int | None = None
    ended: Callable[[], object] = lambda: None
    _full: threading.Event = field(default_factory=threading.Event)
    _stop: threading.Event = field(default_factory=threading.Event)

    def all_of(self, runs: list[RowRun]) -> int:
        """Work on runs in order; the exit status. Where one can't go on, the next does."""
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                statuses = set(pool.map(self._one, runs))
            finally:  # also after KeyboardInterrupt, which is how TERM arrives here
                self._stop.set()
        if EXIT_USAGE in statuses:
            return EXIT_USAGE
        return 0 if all(run.ended for run in runs) else EXIT_TRY_AGAIN

    def _one(self, run: RowRun) -> int:
        if run.ended or self._full.is_set() or self._stop.is_set():
            return 0
        try:
            if self._go_on(run):
                self.ended()
            else:
                self._full.set()
        except UserError as error:
            return told(error)
        return 0

    def _go_on(self, run: RowRun) -> bool:
        """Work on a run until its end or the deadline; whether it ended, else no other is to be started.

        Raises:
            UserError: a command failed; or, passing, it is to be started again, or another process is at it.
        """
        from framework.analysis.results_records import locked

        with locked(run.folder) as lock:
            for number, (kind, command) in list(enumerate(run.steps))[len(run.results) :]:
                if self.deadline - time.monotonic() < SHORTEST:
                    return False
                if (
                    kind == "CKA"
                    and run.reference is not None
                    and not (run.reference / "result.json").exists()
                ):
                    raise UserError.as_transient(
                        f"{run.folder}: waits for {run.reference}, and is compared with it"
                    )
                status = self.ran(command, lock)
                if status is None:
                    return run.ended
                if status == EXIT_TRY_AGAIN:
                    raise UserError.as_transient(f"{run.folder}: is to be started again, see above")
                if status:
                    raise UserError(f"{run.folder}: failed, see above: python {shlex.join(command)}")
                if len(run.results) == number:
                    return False  # somebody stopped it by hand
        return True

    def ran(self, command: list[str], lock: TextIO | None = None) -> int | None:
        """Exit status of a command, which shares the lock; ``None`` if it had to be stopped.

        Killed, this leaves the command at work, which then keeps the lock until its end.
        """
        threads = {} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)}
        shared = () if lock is None else (lock.fileno(),)
        process = subprocess.Popen(
            [sys.executable, *command],
            start_new_session=True,
            pass_fds=shared,
            env={**os.environ, **threads},
        )
        try:
            while not self._stop.is_set() and time.monotonic() < self.deadline:
                try:
                    return process.wait(max(0.0, min(POLL, self.deadline - time.monotonic())))
                except subprocess.TimeoutExpired:
                    continue
            return None
        finally:
            process.terminate()
            process.wait()


def told(error: UserError) -> int:
    """Print an error; its exit status."""
    print(f"{'to be tried again' if error.transient else 'error'}: {error}", file=sys.stderr, flush=True)
    return exit_status(error)


def show(table: ResultsTable, lines: list[dict[str, Any]]) -> None:
    """Print what tells the lines apart."""
    columns = ("row", "seed", "error", "best_error", "paper_error", "images_per_second")
    printed = Printed(title=table.title)
    for column in columns:
        printed.add_column(column.replace("_", " "))
    for line in lines:
        printed.add_row(*("" if line[column] is None else str(line[column]) for column in columns))
    Console().print(printed)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="a YAML file of recipes/results")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="of every row, such as data.path=DIR"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop in time, to go on later")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="where run folders are; default: runs"
    )
    parser.add_argument("--rows", metavar="NAME[,NAME...]", help="train only these; default: all")
    parser.add_argument(
        "--seeds", metavar="N[,N...]", help="train only with these; default: all of the table"
    )
    parser.add_argument("--jobs", type=int, default=1, help="rows that are trained at a time; default: 1")
    parser.add_argument(
        "--threads",
        type=int,
        help="of each; default: OMP_NUM_THREADS, or with several jobs their share of the cores",
    )
    parser.add_argument(
        "--again", action="store_true", help="train what the CSV has, too, unless its folder is there"
    )
    parser.add_argument("--estimate", action="store_true", help="say how long it will take, and leave")
    arguments = parser.parse_intermixed_args()
    for name, number in (("jobs", arguments.jobs), ("threads", arguments.threads)):
        if number is not None and number < 1:
            parser.error(f"--{name} {number}: must be at least 1")
    if arguments.threads is None and arguments.jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
        arguments.threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    if 60 * arguments.minutes <= GRACE + SHORTEST:
        parser.error(
            f"--minutes {arguments.minutes:g}: must be above {(GRACE + SHORTEST) / 60:.2f}: "
            f"a run may take {GRACE:g} seconds to save, and is not started for less than {SHORTEST:g}"
        )
    return arguments


def unrecorded(runs: list[RowRun], path: Path, lines: list[dict[str, str]]) -> list[RowRun]:
    """The runs that a CSV does not have; says what it has with other settings."""
    from framework.analysis.results_progress import is_recorded

    missing = []
    for run in runs:
        there, otherwise = is_recorded(run, lines, path.parent)
        if otherwise and not run.ended:
            print(f"not skipped: {run.row.name!r}, seed {run.seed}: its line {otherwise}", file=sys.stderr)
        if not there:
            missing.append(run)
    return missing


def forecast(runs: list[RowRun], lines: list[dict[str, str]], work: Work, measure: bool) -> None:
    """Say how long runs will take, and with ``measure`` make some steps of rows of which nothing is known."""
    from framework.analysis.results_progress import measured_seconds, seconds_left

    known: dict[str, float] = {}
    left, unknown = 0.0, set()
    for run in [run for run in runs if not run.ended]:
        name = run.row.name
        seconds = seconds_left(run, lines)
        if seconds is None and name not in known and measure:
            found = measured_seconds(run, work.ran)
            known |= {} if found is None else {name: found}
        if seconds is None:
            seconds = known.get(name)
        if seconds is None:
            unknown.add(name)
        else:
            print(f"{name}, seed {run.seed}: {spoken(seconds)}")
            left += seconds
    more = f", and what isn't known yet: {', '.join(map(repr, sorted(unknown)))}" if unknown else ""
    print(f"about {spoken(left / work.jobs)} with --jobs {work.jobs}{more}", flush=True)


def spoken(seconds: float) -> str:
    """Such as "1 h 5 min"."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def main() -> int:
    """Train what is missing, write down what ended.

    Returns:
        The exit status: 0, 75 if there is more to do, 64 if something must be mended.
    """
    arguments = parse()
    path: Path = arguments.table

    from framework.analysis.results_progress import recorded_lines
    from framework.analysis.results_records import write_down
    from framework.analysis.results_tables import ResultsTable
    from framework.runtime.distributed import device
    from framework.tracking.environment import device_name

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        table = ResultsTable.read(path)
        rows = table.named(arguments.rows) if arguments.rows else table.rows
        everything = table.runs(path, arguments.runs, arguments.overrides)
        seeds = table.seeds_named(arguments.seeds) if arguments.seeds else table.seeds
        wanted = [run for run in everything if run.row in rows and run.seed in seeds]
        lines = recorded_lines(path, device_name(device()))
        if not arguments.again:
            wanted = unrecorded(wanted, path, lines)
        writing, written = threading.Lock(), list[dict[str, Any]](lines)

        def write() -> None:
            with writing:
                if ended := [run for run in everything if run.ended]:
                    written[:] = write_down(path, table, ended)

        deadline = time.monotonic() + 60 * arguments.minutes - GRACE
        work = Work(deadline, arguments.jobs, arguments.threads, write)
        if any(not run.ended for run in wanted):
            forecast(wanted, lines, work, arguments.estimate)
        if arguments.estimate:
            return 0
        try:
            status = work.all_of(wanted)
        finally:
            write()
            if written:
                show(table, written)
    except UserError as error:
        return told(error)
    except KeyboardInterrupt:
        return EXIT_TRY_AGAIN
    if status == EXIT_TRY_AGAIN:
        count = sum(run.ended for run in wanted)
        print(f"{count} of {len(wanted)} runs have ended; the same command goes on from here", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(status(main))
