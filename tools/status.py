"""How runs are doing: epoch, speed, time to go, waiting for data, losses, last checkpoint, restarts, what was skipped.

    python tools/status.py RUN_DIR... [--every 2]

In a terminal the lines are drawn anew until Ctrl-C; elsewhere they are printed once.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live

from framework.runtime.command import Parser, bounded, status
from framework.tracking.status import RunStatus, overview


def main() -> None:
    """Print a few lines for each run."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", nargs="+", type=Path, help="such as runs/loco_r50_800ep")
    parser.add_argument("--every", type=bounded(float, 0), default=2.0, help="seconds between two looks")
    arguments = parser.parse_args()
    console = Console()
    runs = [RunStatus(run_dir) for run_dir in arguments.run_dir]
    if not console.is_terminal:
        console.print(overview(runs))
        return
    with (
        contextlib.suppress(KeyboardInterrupt),
        Live(overview(runs), console=console, auto_refresh=False) as live,
    ):
        while True:
            time.sleep(arguments.every)
            live.update(overview(runs), refresh=True)


if __name__ == "__main__":
    sys.exit(status(main))
