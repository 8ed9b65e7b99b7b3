"""Memory of local training beside end-to-end training, counted and, on a GPU, measured.

    python tools/memory_report.py                      the papers' rows (LoCo Tables 6 and 7, MLAAN Table 3)
    python tools/memory_report.py RECIPE_OR_RUN ... [--images 128] [--csv FILE]

Counted are the activations that autograd holds at once, with tensors that have no values; the papers print what a
GPU's allocator held, weights and workspace included. On a machine with a GPU that is measured too.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from framework.analysis.arguments import leave
from framework.config import loading
from framework.runtime.command import Parser, bounded, status
from framework.runtime.errors import UserError
from framework.runtime.files import write_whole

if TYPE_CHECKING:
    from framework.analysis.memory_tables import Memory, Published

GIB = 2**30
COLUMNS = (
    "plan",
    "images",
    "paper_end_to_end_gb",
    "paper_method_gb",
    "paper_saving",
    "counted_end_to_end_gib",
    "counted_method_gib",
    "counted_saving",
    "counted_to_paper",
    "device",
    "commit",
)


def main() -> None:
    """Count, print tables, leave ``memory.json`` and ``memory.png``."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="*", metavar="RECIPE_OR_RUN", help="default: the rows of the papers")
    parser.add_argument(
        "--images",
        type=bounded(int, 1),
        help="on one device; default: the recipe's batch on one rank, or the paper's",
    )
    parser.add_argument("--csv", type=Path, help="also write the counted rows here, beside the paper's")
    parser.add_argument("--out", type=Path, default=Path("runs/memory"), help="folder; default: runs/memory")
    arguments = parser.parse_args()
    if arguments.images is not None and arguments.images < 2:
        raise UserError(f"--images {arguments.images}: must be at least 2, for BatchNorm")
    from framework.analysis import memory_tables

    if arguments.plans:
        rows = [_own(Path(plan), arguments.images) for plan in track(arguments.plans, "counting")]
        stages: list[dict[str, Any]] = []
    else:
        rows = [_published(row, arguments.images) for row in track(memory_tables.PUBLISHED, "counting")]
        stages = [row for network in track(memory_tables.STAGES, "Table 6") for row in _stages(network)]
    _show(rows, stages)
    if arguments.csv:
        write_whole(arguments.csv, _csv(rows))
    bars = [(str(row["label"]), float(row["saving"]), row["paper_saving"]) for row in rows]
    leave(arguments.out, "memory", {"rows": rows, "stages": stages}, memory_tables.draw_savings(bars))


def _published(row: Published, images: int | None) -> dict[str, Any]:
    from framework.analysis.memory_tables import measure, published_recipe
    from framework.cost.counting import likely_classes

    recipe = published_recipe(row.recipe)
    found = measure(recipe, likely_classes(recipe), images or row.images)
    label = f"{row.network}, {row.method} ({row.table})"
    return _row(label, images or row.images, found, row.saving, row.gigabytes)


def _own(plan: Path, images: int | None) -> dict[str, Any]:
    path = plan / "recipe.yaml" if plan.is_dir() else plan
    recipe = loading.load([str(path), *(["data.path=unused"] if path == plan else [])])
    from framework.analysis.memory_tables import measure
    from framework.cost.counting import likely_classes

    images = images or recipe.train.batch_size // recipe.micro_batches
    found = measure(recipe, likely_classes(recipe), images)
    return _row(f"{recipe.name}: {recipe.method.name}", images, found, None, None)


def _row(
    label: str, images: int, found: Memory, saving: float | None, paper: tuple[float, float] | None
) -> dict[str, Any]:
    allocated = found.allocated
    return {
        "label": label,
        "images": images,
        "counted_gib": [c / GIB for c in found.counted],
        "saving": found.saving,
        "paper_saving": saving,
        "paper_gb": paper,
        "allocated_gib": [a / GIB for a in allocated] if allocated else None,
        "allocated_saving": allocated[0] / allocated[1] if allocated else None,
    }


def _stages(network: str) -> list[dict[str, Any]]:
    """LoCo Table 6, row by row."""
    from framework.analysis.memory_tables import STAGES, published_recipe, stage_shares

    recipe, *printed = STAGES[network]
    columns = zip(*stage_shares(published_recipe(recipe)), *printed, strict=True)
    keys = ("memory", "flops", "paper_memory", "paper_flops")
    return [
        {"network": network, "stage": f"res{i}", **dict(zip(keys, values, strict=True))}
        for i, values in enumerate(columns, 2)
    ]


def _show(rows: list[dict[str, Any]], stages: list[dict[str, Any]]) -> None:
    console = Console(width=110)
    table = Table(title="peak memory in GiB (papers: GB), end-to-end / method, and how many times less")
    columns = {"counted": ("counted_gib", "saving"), "paper": ("paper_gb", "paper_saving")}
    columns["allocator"] = ("allocated_gib", "allocated_saving")
    shown = {name: keys for name, keys in columns.items() if any(row[keys[1]] for row in rows)}
    for name in ("plan", "images", *(heading for kind in shown for heading in (kind, "less"))):
        table.add_column(name, justify="left" if name == "plan" else "right")
    for row in rows:
        cells = [text for pair, ratio in shown.values() for text in (_pair(row[pair]), _ratio(row[ratio]))]
        table.add_row(row["label"], str(row["images"]), *cells)
    console.print(table)
    if stages:
        shares = Table(title="LoCo Table 6: shares of the stages in per cent")
        for name in ("network", "stage", "memory", "paper", "FLOPs", "paper"):
            shares.add_column(name, justify="left" if name in ("network", "stage") else "right")
        for row in stages:
            values = (row["memory"], row["paper_memory"], row["flops"], row["paper_flops"])
            shares.add_row(row["network"], row["stage"], *(f"{value:.2f}" for value in values))
        console.print(shares)


def _csv(rows: list[dict[str, Any]]) -> str:
    """The counted rows; what the papers don't print is empty."""
    import torch

    from framework.tracking.environment import environment

    here = environment(1, torch.device("cpu"))  # where they are counted
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        paper = row["paper_gb"] or (None, None)
        ratio = row["saving"] / row["paper_saving"] if row["paper_saving"] else None
        values = (*paper, row["paper_saving"], *row["counted_gib"], row["saving"], ratio)
        rounded = ["" if value is None else f"{value:.4g}" for value in values]
        writer.writerow((row["label"], row["images"], *rounded, here["device"], here["commit"]))
    return buffer.getvalue()


def _pair(values: list[float] | None) -> str:
    return "-" if values is None else f"{values[0]:.3g} / {values[1]:.3g}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


if __name__ == "__main__":
    sys.exit(status(main))
