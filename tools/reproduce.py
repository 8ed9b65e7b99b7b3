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
import csv
import fcntl
import io
import json
import math
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.table import Table as Printed

from framework.runtime.errors import UserError
from framework.runtime.exit_status import EXIT_TRY_AGAIN, EXIT_USAGE, exit_status
from framework.runtime.files import write_whole

if TYPE_CHECKING:
    from framework.analysis.results_tables import EvidenceTable, RowRun

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


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[TextIO]:
    """A lock beside a file or folder, until this and whichever process it was handed to let go of it.

    Raises:
        UserError: another has it, and this is not to wait, which passes; or there can be none.
    """
    name = path.with_name(f".{path.name}.lock")
    try:
        name.parent.mkdir(parents=True, exist_ok=True)
        lock = name.open("w")
    except OSError as error:
        raise UserError(f"{name}: can't be written: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise UserError(f"{path}: skipped, for another process trains there") from error
        yield lock


def write_down(path: Path, table: EvidenceTable, ended: list[RowRun]) -> list[dict[str, Any]]:
    """Write CSV, curves and logs of the runs that ended, on every device; returns the lines of all CSVs.

    Raises:
        UserError: a line that stays has lost its log; nothing is written.
    """
    groups: dict[Path, list[RowRun]] = {}
    for run in ended:
        device = re.sub(r"[^a-z0-9]+", "-", run.said("device").lower()).strip("-")
        groups.setdefault(path.with_name(f"{path.stem}-{device}.csv"), []).append(run)
    with locked(path, wait=True):
        lines = {written: merged(written, table, group) for written, group in groups.items()}
        for written, group in groups.items():
            for run in group:
                write_whole(path.parent / log_of(written, run), run.log())
            buffer = io.StringIO()
            keys = dict.fromkeys(key for line in lines[written] for key in line)
            writer = csv.DictWriter(buffer, list(keys), lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines[written])
            write_whole(written, buffer.getvalue())
            draw(written.with_suffix(".png"), table, lines[written])
    return [line for group in lines.values() for line in group]


def log_of(written: Path, run: RowRun) -> Path:
    """Where the log of a line of a CSV is, from the CSV's folder."""
    return Path("logs", written.stem, f"{run.folder.name}.jsonl")


def merged(written: Path, table: EvidenceTable, runs: list[RowRun]) -> list[dict[str, Any]]:
    """Lines of these runs and, from the CSV, of those whose folders are elsewhere; last those not in the table.

    Raises:
        UserError: a line that stays has lost its log.
    """
    old = list(csv.DictReader(written.read_text().splitlines())) if written.exists() else []
    lines: dict[tuple[str, str], dict[str, Any]] = {(line["row"], line["seed"]): line for line in old}
    new = {(run.row.name, str(run.seed)): run.line(table.score, log_of(written, run)) for run in runs}
    lines |= new
    wanted = [(row.name, str(seed)) for seed in table.seeds for row in table.rows]
    ordered = [lines[key] for key in wanted if key in lines]
    for key, line in lines.items():
        if key in wanted and key not in new and not (written.parent / line["log"]).exists():
            raise UserError(f"{written}: {line['log']} is missing: restore it, or remove the line {key[0]!r}")
    logs = {line["log"] for line in ordered}  # a row may have been renamed to one of the same log
    others = [line for key, line in lines.items() if key not in wanted and line["log"] not in logs]
    for line in others:
        fate = "kept; remove its log to drop it" if (written.parent / line["log"]).exists() else "dropped"
        print(
            f"warning: {written}: {line['row']!r}, seed {line['seed']}, is not in the table: {fate}",
            file=sys.stderr,
        )
    return ordered + [line for line in others if (written.parent / line["log"]).exists()]


def draw(path: Path, table: EvidenceTable, lines: list[dict[str, Any]]) -> None:
    """Loss of the last unit, and the error where it was measured during training; a color a row. From the logs."""
    from matplotlib.figure import Figure

    logs = [
        [json.loads(text) for text in (path.parent / line["log"]).read_text().splitlines()] for line in lines
    ]
    measured = any(table.score in entry.get("scores", ()) for log in logs for entry in log)
    figure = Figure(figsize=(10 if measured else 6.4, 4), layout="constrained")
    loss, *error = figure.subplots(1, 1 + measured, squeeze=False)[0]
    rows = list(dict.fromkeys([*(row.name for row in table.rows), *(line["row"] for line in lines)]))
    for line, log in zip(lines, logs, strict=True):
        number = rows.index(line["row"])  # Matplotlib has ten colors
        style: dict[str, Any] = {
            "color": f"C{number}",
            "linestyle": "--" if number > 9 else "-",
            "alpha": 0.4,
        }
        if str(line["seed"]) == str(table.seeds[0]):
            style |= {"alpha": 1.0, "label": line["row"]}
        means = [(entry["epoch"], list(entry["losses"].values())[-1]) for entry in log if "losses" in entry]
        loss.plot(*zip(*means, strict=True), **style)
        for entry in log:
            if table.score in entry.get("scores", ()):
                curve = entry["scores"][table.score]
                error[0].plot(curve["epochs"], [100 - accuracy for accuracy in curve["top1"]], **style)
    loss.set(xlabel="epoch", ylabel="training loss of the last unit")
    loss.legend(fontsize="small")
    for axes in error:
        axes.set(xlabel="epoch", ylabel="test error in %")
    figure.suptitle(textwrap.fill(table.title, 100 if measured else 64))
    figure.savefig(path, dpi=110)


def show(table: EvidenceTable, lines: list[dict[str, Any]]) -> None:
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

    from framework.analysis.results_tables import EvidenceTable

    deadline = time.monotonic() + 60 * arguments.minutes - GRACE
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        table = EvidenceTable.read(arguments.table)
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
