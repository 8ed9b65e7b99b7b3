"""What sharding by segment takes and sends, beside data parallelism and PyTorch's own sharding.

    python tools/bench_sharding.py --network vit_large_patch16_224 --ranks 2 --engine ddp,fsdp,fsdp2

Every row is a training of its own between processes of this machine (gloo, AdamW, one thread each), from the first
step on; the engine ``fsdp2`` is PyTorch's FSDP2 on end-to-end training (``--method simclr``), a segment a shard group.

* gathered, reduced: bytes of the collectives of a step, as tensors; weights: those of all weights, heads included
* whole: largest share of the weights that is whole at once
* peak: largest resident memory of a rank in its steps, less what it had before the network was built
* state: weights, gradients and optimizer of the whole
* waited: seconds of a step in which a rank waited for a collective; alone: what the same collectives take by themselves
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from framework.runtime.command import Parser, bounded, status
from framework.runtime.errors import UserError
from framework.runtime.files import write_whole

ENGINES = ("ddp", "fsdp", "fsdp2")
MIB = 2**20


def chosen(arguments: argparse.Namespace) -> list[tuple[str, str, int]]:
    """Engine, method and ranks of each row.

    Raises:
        UserError: something that there is not.
    """
    from benched_steps import check

    engines, methods = arguments.engine.split(","), arguments.method.split(",")
    for engine in engines:
        if engine not in ENGINES:
            raise UserError(f"--engine {engine}: must be among {', '.join(ENGINES)}")
    for method in methods:
        check(method, "paper")
    numbers = arguments.ranks.split(",")
    if not all(number.isdigit() and int(number) > 0 for number in numbers):
        raise UserError(f"--ranks {arguments.ranks}: must be whole numbers above 0, with commas")
    rows = [(engine, method, int(n)) for n in numbers for engine in engines for method in methods]
    rows = [row for row in rows if row[0] != "fsdp2" or row[1] == "simclr"]
    if not rows:
        raise UserError("--engine fsdp2: is for --method simclr")
    return rows


def show(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Print the rows as a table."""
    table = Table(title=f"{arguments.network}, {arguments.batch} images a rank, MiB a rank")
    for column in ("engine", "method"):
        table.add_column(column)
    for column in (
        "ranks",
        "weights",
        "state",
        "peak",
        "whole",
        "gathered",
        "reduced",
        "s",
        "waited",
        "alone",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        sizes = (row[f"{key}_bytes"] / MIB for key in ("weight", "state", "peak"))
        traffic = (row[f"{key}_bytes"] / MIB for key in ("gathered", "reduced"))
        table.add_row(
            row["engine"],
            row["method"],
            str(row["ranks"]),
            *(f"{size:.0f}" for size in sizes),
            f"{row['whole_weights']:.2f}",
            *(f"{size:.0f}" for size in traffic),
            *(f"{row[key]:.2f}" for key in ("seconds", "waited", "alone")),
        )
    Console(width=120).print(table)


def main() -> None:
    """Parse, run every row in processes of its own, print."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="vit_base_patch16_224", help="any network that can be cut")
    parser.add_argument("--ranks", default="2", help="processes, with commas")
    parser.add_argument("--method", default="simclr,gim,loco", help="as in bench_step, with commas")
    parser.add_argument("--engine", default="ddp,fsdp,fsdp2", help="with commas")
    parser.add_argument("--cut", choices=("stage", "block"), default="block")
    parser.add_argument("--batch", type=bounded(int, 2), default=4, help="images a rank and step, all views")
    parser.add_argument("--image-size", type=bounded(int, 1), default=224)
    parser.add_argument("--steps", type=bounded(int, 1), default=3, help="whose fastest counts")
    parser.add_argument("--json", type=Path, help="add the rows to this file")
    parser.set_defaults(head="paper", window=2, modules=None, precision="fp32", channels_last=False)
    arguments = parser.parse_args()

    import sharded_steps
    from torch.multiprocessing import spawn

    # Large blocks go back to the system at once, so that resident memory is memory in use.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    rows = []
    with Progress(console=Console(stderr=True)) as progress:
        for engine, method, ranks in progress.track(chosen(arguments)):
            with TemporaryDirectory() as folder:
                spawn(sharded_steps.measure, (engine, method, ranks, arguments, folder), ranks)
                rows.append(json.loads(Path(folder, "row.json").read_text()))
    show(rows, arguments)
    if arguments.json:
        earlier = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
        write_whole(arguments.json, json.dumps([*earlier, *rows], indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(status(main))
