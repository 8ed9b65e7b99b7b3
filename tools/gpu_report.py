"""Check and measure on one GPU what no machine without one can, in pieces.

    python tools/gpu_report.py --minutes 8 --out runs/gpu
    python tools/gpu_report.py --device cpu

First checks, which are the tests marked ``gpu`` (``pytest -m gpu``), those that are likeliest to fail first; then rows
of speed and memory. Every piece runs in a process of its own: a crash, a hang or a lack of memory ends no other.
What came out is in --out at once: ``report.jsonl``, from which the same command goes on after the minutes are over or
it was killed; ``failures.md``; ``log.txt``, what the processes printed; and tables as ``recipes/results`` has them
(``step_gpu_*.csv``, ``memory_measured.csv``). ``--again`` repeats what failed. With ``--device cpu`` it is a rehearsal:
few cases, tiny networks; what is impossible is listed as in need of a GPU. The exit status is 1 if something failed.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from framework.runtime.command import Parser, bounded, status
from framework.runtime.errors import UserError


def main() -> int:
    """Work until all is done or the minutes are over; the exit status."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=bounded(float, 0.1), default=600.0, help="after which to stop")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder; default: runs/gpu")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal")
    parser.add_argument("--again", action="store_true", help="also repeat what failed")
    arguments = parser.parse_args()
    if arguments.out.exists() and not arguments.out.is_dir():
        raise UserError(f"--out {arguments.out}: must be a folder")

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no process is left behind
    from gpu_pieces import EVENTS, pieces
    from gpu_work import Record, Work

    here = surroundings(arguments.device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    record = Record(arguments.out.resolve() / EVENTS)
    record.begin(here, arguments.again)
    work = Work(record, arguments.device, arguments.minutes)
    chosen = pieces(arguments.device)
    for piece in work.track(chosen):
        work.on(piece)
        failures = record.write_failures(arguments.out / "failures.md", chosen)
    show(record.summary(chosen))
    if failures:
        print(f"{failures} failed; {arguments.out / 'failures.md'} says what and why")
    return 1 if failures else 0


def surroundings(device: str) -> dict[str, Any]:
    """Device, commit and versions.

    Raises:
        UserError: there is no GPU.
    """
    import torch

    from framework.tracking.environment import environment

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("no GPU that PyTorch can use: --device cpu rehearses what can do without")
    found = environment(1, torch.device(device))
    return {key: found[key] for key in ("device", "commit", "versions")}


def show(rows: list[tuple[str, ...]]) -> None:
    """Print the summary."""
    table = Table(title="what came out")
    for column in ("piece", "passed", "failed", "skipped", "to do", "seconds"):
        table.add_column(column, justify="left" if column == "piece" else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=110).print(table)


if __name__ == "__main__":
    sys.exit(status(main))
