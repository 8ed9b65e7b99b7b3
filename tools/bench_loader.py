"""Images per second that one core loads, beside other loaders on the same images.

    python tools/bench_loader.py --shards data/imagenet/train [--made-up 1281167] [--json rows.json]
    python tools/bench_loader.py --shards data/cifar10/train --image-size 32 --batch 500 --memory

Everything runs in this process on one thread, with its files in the page cache. A rate is images per second
of processor time: what one core gives, whatever other jobs leave of it. The loaders take turns, round after
round; a row has the median. ``bare`` is a loop over images in memory that does nothing else. ``--memory`` adds
``data.cache=memory``, for images of one size, on the GPU if there is one; then all are timed by the clock, and the rate
is of everything together, not of a core. Rows say which device and clock. ``--made-up`` also times (by the clock)
opening an index of that many samples, and going on at 90 % of an epoch.
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
from framework.runtime.files import write_whole


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table."""
    rate = "images_per_second" if "images_per_second" in rows[0] else "images_per_second_per_core"
    table = Table("view", "loader", rate.replace("_per_", " / ").replace("second", "s"), "seconds", "MB")
    for row in rows:
        cells = [str(row.get(key, "")) for key in (rate, "seconds", "megabytes")]
        table.add_row(row["view"], row["loader"], *cells)
    Console(width=100).print(table)


def main() -> None:
    """Parse, measure, print."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shards", type=Path, required=True, help="folder of shards, as make_shards.py packs"
    )
    parser.add_argument(
        "--image-size", type=bounded(int, 1), default=224, help="side of a view; default: 224"
    )
    parser.add_argument("--batch", type=bounded(int, 1), default=50, help="largest batch; default: 50")
    parser.add_argument(
        "--rounds", type=bounded(int, 1), default=5, help="measured passes over the images; default: 5"
    )
    parser.add_argument(
        "--memory", action="store_true", help="also data.cache=memory, for images of one size"
    )
    parser.add_argument(
        "--made-up", type=bounded(int, 1), metavar="N", help="also open a made-up index of N samples"
    )
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()

    import torch
    from loader_rates import made_up, rates

    torch.set_num_threads(1)
    rows = rates(arguments) + (made_up(arguments.made_up) if arguments.made_up else [])
    show(rows)
    if arguments.json:
        write_whole(arguments.json, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(status(main))
