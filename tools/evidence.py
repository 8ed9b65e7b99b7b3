"""Train the rows of a table of results, in pieces, and write down what came out.

    python tools/evidence.py recipes/results/cifar10_r32_400ep_b1024.yaml data.path=data/cifar10 --minutes 9

Every row is trained once per seed, in a run folder of its own below ``--runs``. With ``--minutes``, or on TERM, the
run at work saves and this ends with status 75; the same command goes on from there. Beside the table come, for every
device, ``TABLE-DEVICE.csv`` with a line per finished run, ``TABLE-DEVICE.png`` with their curves, and below ``logs/``
the settings, curves and results behind each line.
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
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table as Printed

from framework.analysis.evidence import EvidenceTable, RowRun
from framework.command import status
from framework.control import GO_ON_LATER
from framework.errors import UserError
from framework.files import write_whole

GRACE = 45.0  # seconds that a run may take to finish its step and save


def go_on(run: RowRun, deadline: float) -> bool:
    """Work on a run until its end or the deadline; whether it ended.

    Raises:
        UserError: a command failed.
    """
    for command in run.commands[len(run.results) :]:
        with locked(run.folder) as lock:
            process = subprocess.Popen(
                [sys.executable, *command], start_new_session=True, pass_fds=[lock.fileno()]
            )
            try:
                process.wait(max(0.0, deadline - time.monotonic()) if math.isfinite(deadline) else None)
            except subprocess.TimeoutExpired:
                process.terminate()
                process.wait()
                return run.ended
            except KeyboardInterrupt:  # which is how TERM arrives here
                process.terminate()
                process.wait()
                raise
        if process.returncode == GO_ON_LATER:
            return False
        if process.returncode:
            raise UserError(f"{run.folder}: failed, see above: python {shlex.join(command)}")
        if not run.files[run.commands.index(command)].exists():
            return False  # somebody stopped it by hand
    return True


@contextmanager
def locked(folder: Path) -> Iterator[TextIO]:
    """A lock that the run at work shares, so that it holds for as long as that lives, should this be killed.

    Raises:
        UserError: another has it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: another process trains there; wait for it, or end it") from error
        yield lock


def write_down(path: Path, table: EvidenceTable, ended: list[RowRun]) -> list[dict[str, Any]]:
    """Write CSV, curves and logs of the runs that ended, on every device; returns the lines of all CSVs."""

    def device(run: RowRun) -> str:
        return re.sub(r"[^a-z0-9]+", "-", run.said("device").lower()).strip("-")

    everything = []
    for name, group in groupby(sorted(ended, key=device), device):
        lines: dict[tuple[str, str], dict[str, Any]] = {}
        written = path.parent / f"{path.stem}-{name}.csv"
        if written.exists():  # runs whose folders are elsewhere stay
            for line in csv.DictReader(written.read_text().splitlines()):
                lines[line["row"], line["seed"]] = line
        for run in group:
            log = Path("logs", f"{path.stem}-{name}", f"{run.folder.name}.jsonl")
            write_whole(path.parent / log, run.log())
            lines[run.row.name, str(run.seed)] = run.line(table.score, log)
        wanted = [(row.name, str(seed)) for seed in table.seeds for row in table.rows]
        ordered = [lines[key] for key in wanted if key in lines]
        buffer = io.StringIO()
        writer = csv.DictWriter(
            buffer, list(dict.fromkeys(k for line in ordered for k in line)), lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(ordered)
        write_whole(written, buffer.getvalue())
        draw(written.with_suffix(".png"), table, ordered)
        everything += ordered
    return everything


def draw(path: Path, table: EvidenceTable, lines: list[dict[str, Any]]) -> None:
    """Loss of the last unit, and the error where it was measured during training; a colour a row. From the logs."""
    logs = [
        [json.loads(text) for text in (path.parent / line["log"]).read_text().splitlines()] for line in lines
    ]
    measured = any(table.score in entry.get("scores", ()) for log in logs for entry in log)
    figure = Figure(figsize=(10 if measured else 6.4, 4), layout="constrained")
    loss, *error = figure.subplots(1, 1 + measured, squeeze=False)[0]
    rows = [row.name for row in table.rows]
    for line, log in zip(lines, logs, strict=True):
        style: dict[str, Any] = {"color": f"C{rows.index(line['row'])}", "alpha": 0.4}
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


def main() -> int:
    """Train what is missing, write down what ended; the exit status: 0, or 75 if there is more to do."""
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
    arguments = parser.parse_intermixed_args()
    if 60 * arguments.minutes <= GRACE:
        parser.error(
            f"--minutes {arguments.minutes:g}: must be above {GRACE / 60:g}, which a run may take to save"
        )
    deadline = time.monotonic() + 60 * arguments.minutes - GRACE
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        table = EvidenceTable.read(arguments.table)
        everything = table.runs(arguments.table, arguments.runs, arguments.overrides)
        for run in everything:
            if not run.ended and (time.monotonic() > deadline or not go_on(run, deadline)):
                break
        ended = [run for run in everything if run.ended]
        if ended:
            show(table, write_down(arguments.table, table, ended))
    except KeyboardInterrupt:
        return GO_ON_LATER
    if len(ended) == len(everything):
        return 0
    print(
        f"{len(ended)} of {len(everything)} runs have ended; the same command goes on from here", flush=True
    )
    return GO_ON_LATER


if __name__ == "__main__":
    sys.exit(status(main))
