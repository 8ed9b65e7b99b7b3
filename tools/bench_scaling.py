"""What a network between many ranks costs data parallelism, with PyTorch's overlap, with ours, and without any.

    python tools/bench_scaling.py --network resnet50 --ranks 16 --gbit 100,400 --images-per-second 2500

A step of each method is run here, on one rank, and noted when each bucket of gradients is finished and when the next
step needs it. These times are scaled to a device that trains so many images a second end to end, and a clock is run
over them: buckets travel one after the other over a ring of ranks, one link each, and take no processor. Efficiency
is the time of the computation / that of the step.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from framework.runtime.command import Parser, bounded, status
from framework.runtime.errors import UserError
from framework.runtime.files import write_whole


def numbers(text: str) -> list[float]:
    """Numbers above 0 with commas between them.

    Raises:
        UserError: they are something else.
    """
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < number < float("inf") for number in found):
        raise UserError(f"--gbit {text}: must be numbers above 0, with commas")
    return found


def show(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Print the rows as a table."""
    title = f"{arguments.network}, {arguments.ranks} ranks: share of the step that is computation, simulated"
    table = Table(title=title)
    ways = ("no overlap", "early", "late")
    for column in ("Gbit/s", "method", "ms", *ways):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        shares = [f"{row[way]:.3f}" for way in ways]
        if row["method"] == "ddp":
            shares[2] = "-"
        name = "end to end, PyTorch's DDP" if row["method"] == "ddp" else row["method"]
        table.add_row(f"{row['gbit']:g}", name, f"{row['seconds'] * 1000:.1f}", *shares)
    Console(width=110).print(table)


def main() -> None:
    """Parse, run a step of each method, simulate, print."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet50", help="any network that can be cut")
    parser.add_argument("--method", default="gim,loco", help="as in bench_step, with commas")
    parser.add_argument("--cut", choices=("stage", "block"), default="stage")
    parser.add_argument("--ranks", type=bounded(int, 2), default=16)
    parser.add_argument("--gbit", default="100,400", help="that a rank's link carries in a second")
    parser.add_argument(
        "--images-per-second", type=bounded(float, 0.001), default=2500.0, help="of a rank, end to end"
    )
    parser.add_argument(
        "--device-batch", type=bounded(int, 2), default=256, help="images a rank and step, all views"
    )
    parser.add_argument("--batch", type=bounded(int, 2), default=8, help="of the steps that are run here")
    parser.add_argument("--image-size", type=bounded(int, 1), default=128, help="likewise")
    parser.add_argument("--window", type=bounded(int, 1), default=2, help="segments in a window")
    parser.add_argument("--rounds", type=bounded(int, 1), default=3, help="of which the fastest counts")
    parser.add_argument("--threads", type=bounded(int, 1), default=1, help="CPU threads")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.set_defaults(head="paper", modules=None, precision="fp32", channels_last=False)
    arguments = parser.parse_args()
    gbits = numbers(arguments.gbit)

    import simulated_wire
    import torch
    import wired_steps
    from benched_steps import check

    methods = arguments.method.split(",")
    for method in methods:
        check(method, arguments.head)
    torch.set_num_threads(arguments.threads)
    steps = wired_steps.recorded(methods, arguments)
    target = arguments.device_batch / arguments.images_per_second
    factor = steps["ddp"].seconds / target
    rows = simulated_wire.rows(
        {name: step.at_speed(factor) for name, step in steps.items()}, arguments.ranks, gbits
    )
    show(rows, arguments)
    if arguments.json:
        write_whole(arguments.json, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(status(main))
