"""Measure rows of ``gpu_report``'s tables, one after the other, in this process; ``gpu_report`` starts it.

    python tools/gpu_rows.py --events runs/gpu/report.jsonl --piece "ResNet-32, K=16" ROW ...

The tables are beside the file of events. A row that fails is noted there, and the next one follows.
"""

from __future__ import annotations

import argparse
import gc
import shlex
import sys
from pathlib import Path
from typing import Any

from framework.runtime.command import Parser, status
from framework.runtime.errors import UserError

GIB = 2**30


def main() -> None:
    """Measure and write down."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=Path, required=True, help="file of events")
    parser.add_argument("--piece", required=True, help="of gpu_report")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("rows", nargs="*", metavar="ROW", help="default: all of the piece")
    arguments = parser.parse_args()

    import torch
    from gpu_events import Events
    from gpu_pieces import pieces

    found = [piece for piece in pieces(arguments.device) if piece.rows and piece.name == arguments.piece]
    if not found:
        raise UserError(f"--piece {arguments.piece}: no such piece of rows")
    (piece,) = found
    if unknown := set(arguments.rows) - set(piece.rows):
        raise UserError(f"{min(unknown)}: no such row of {piece.name}")
    events = Events(arguments.events, piece.name)
    path = arguments.events.parent / f"{piece.csv}.csv"
    events.add("items", items=list(piece.rows))
    for row in arguments.rows or piece.rows:
        options = piece.rows[row]
        if arguments.device == "cpu" and (not options or "--cuda-graph" in options):
            events.end(row, "skipped", 0.0, "needs a GPU")
            continue
        with events.item(row):
            add_memory(path, row) if not options else add_step(path, options)
        gc.collect()
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.synchronize()  # raises after a kernel that went wrong: the others want a new process


def add_step(path: Path, options: str) -> None:
    """A row of ``bench_step``'s table."""
    import bench_step
    import csv_rows

    arguments = bench_step.argument_parser().parse_args(shlex.split(options))
    bench_step.set_up(arguments)
    if not csv_rows.is_in(path, bench_step.conditions(arguments.method, arguments)):
        csv_rows.append(path, bench_step.row(arguments.method, arguments))


def add_memory(path: Path, label: str) -> None:
    """The allocator's peak beside that of a paper."""
    import csv_rows
    import torch

    from framework.analysis import memory_tables
    from framework.cost.counting import likely_classes
    from framework.tracking.environment import environment

    if csv_rows.is_in(path, {"plan": label}):
        return
    (row,) = (r for r in memory_tables.PUBLISHED if label == f"{r.network}, {r.method} ({r.table})")
    recipe = memory_tables.published_recipe(row.recipe)
    whole, own = memory_tables.allocated(recipe, likely_classes(recipe), row.images)
    here = environment(1, torch.device("cuda"))
    values: dict[str, Any] = {
        "plan": label,
        "images": row.images,
        "paper_end_to_end_gb": row.gigabytes[0] if row.gigabytes else None,
        "paper_method_gb": row.gigabytes[1] if row.gigabytes else None,
        "paper_saving": row.saving,
        "allocated_end_to_end_gib": whole / GIB,
        "allocated_method_gib": own / GIB,
        "allocated_saving": whole / own,
        "allocated_to_paper": whole / own / row.saving,
    }
    rounded = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in values.items()}
    line = {
        **rounded,
        "precision": recipe.train.precision,
        "device": here["device"],
        "commit": here["commit"],
    }
    csv_rows.append(path, line)


if __name__ == "__main__":
    sys.exit(status(main))
