"""Train the rows of a table of results, in pieces, and write down what came out.

    python tools/reproduce.py recipes/results/cifar10_r32_400ep_b1024.yaml data.path=data/cifar10 --minutes 9

Every row is trained once per seed, in a run folder of its own below ``--runs``. With ``--minutes``, or on TERM, the
run at work saves and this ends with status 75; the same command goes on from there. After a row that fails come the
others, and the status is 64; one that another process trains is skipped, so that several can share a table. Beside the
table come, for every device, ``TABLE-DEVICE.csv`` with a line per finished run, ``TABLE-DEVICE.png`` with their curves,
and below ``logs/`` the settings, curves and results behind each line.
"""

from __future__ import annotations

import argparse
import math
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.table import Table as Printed

from framework.runtime.errors import UserError
from framework.runtime.exit_status import EXIT_TRY_AGAIN, EXIT_USAGE, exit_status

if TYPE_CHECKING:
    from framework.analysis.results_tables import ResultsTable, RowRun

GRACE = 45.0  # seconds that a run may take to finish its step and save
SHORTEST = 20.0  # seconds below which no command is started


def work(runs: list[RowRun], deadline: float) -> int:
    """Work on one run after the other until the deadline; the exit status. Where one can't go on, the next does."""
    statuses = set()
    for run in runs:
        try:
            if not run.ended and not go_on(run, deadline):
                break
        except UserError as error:
            statuses.add(told(error))
    if EXIT_USAGE in statuses:
        return EXIT_USAGE
    return 0 if all(run.ended for run in runs) else EXIT_TRY_AGAIN


def told(error: UserError) -> int:
    """Print an error; its exit status."""
    print(f"{'to be tried again' if error.transient else 'error'}: {error}", file=sys.stderr, flush=True)
    return exit_status(error)


def go_on(run: RowRun, deadline: float) -> bool:
    """Work on a run until its end or the deadline; whether it ended, else the table is to stop here.

    Raises:
        UserError: a command failed; or, passing, it is to be started again, or another process is at it.
    """
    from framework.analysis.results_records import locked

    with locked(run.folder) as lock:
        for number, command in list(enumerate(run.commands))[len(run.results) :]:
            if deadline - time.monotonic() < SHORTEST:
                return False
            status = ran(command, deadline, lock)
            if status is None:
                return run.ended
            if status == EXIT_TRY_AGAIN:
                raise UserError.as_transient(f"{run.folder}: is to be started again, see above")
            if status:
                raise UserError(f"{run.folder}: failed, see above: python {shlex.join(command)}")
            if len(run.results) == number:
                return False  # somebody stopped it by hand
    return True


def ran(command: list[str], deadline: float, lock: TextIO) -> int | None:
    """Exit status of a command, which shares the lock; ``None`` if it had to be stopped at the deadline."""
    process = subprocess.Popen([sys.executable, *command], start_new_session=True, pass_fds=[lock.fileno()])
    try:
        return process.wait(deadline - time.monotonic() if math.isfinite(deadline) else None)
    except subprocess.TimeoutExpired:
        return None
    finally:  # also after KeyboardInterrupt, which is how TERM arrives here
        process.terminate()
        process.wait()


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path, help="a YAML file of recipes/results")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="of every row, such as data.path=DIR"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop in time, to go on later")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="where run folders are; default: runs"
    )
    parser.add_argument("--rows", metavar="NAME[,NAME...]", help="train only these; default: all")
    arguments = parser.parse_intermixed_args()
    if 60 * arguments.minutes <= GRACE + SHORTEST:
        parser.error(
            f"--minutes {arguments.minutes:g}: must be above {(GRACE + SHORTEST) / 60:.2f}: "
            f"a run may take {GRACE:g} seconds to save, and is not started for less than {SHORTEST:g}"
        )
    return arguments


def main() -> int:
    """Train what is missing, write down what ended.

    Returns:
        The exit status: 0, 75 if there is more to do, 64 if something must be mended.
    """
    arguments = parse()

    from framework.analysis.results_records import write_down
    from framework.analysis.results_tables import ResultsTable

    deadline = time.monotonic() + 60 * arguments.minutes - GRACE
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        table = ResultsTable.read(arguments.table)
        rows = table.named(arguments.rows) if arguments.rows else table.rows
        everything = table.runs(arguments.table, arguments.runs, arguments.overrides)
        wanted = [run for run in everything if run.row in rows]
        try:
            status = work(wanted, deadline)
        finally:
            ended = [run for run in everything if run.ended]
            if ended:
                show(table, write_down(arguments.table, table, ended))
    except UserError as error:
        return told(error)
    except KeyboardInterrupt:
        return EXIT_TRY_AGAIN
    if status == EXIT_TRY_AGAIN:
        count = sum(run.ended for run in wanted)
        print(f"{count} of {len(wanted)} runs have ended; the same command goes on from here", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
