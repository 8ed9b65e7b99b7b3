"""Runs at a glance: epoch, speed, time to go, losses of the units, restarts, what was skipped, the last checkpoint.

    python tools/status.py RUN_DIR... [--every 2]

In a terminal the table is drawn anew until Ctrl-C; elsewhere it is printed once.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live

from framework.errors import UserError
from framework.status import RunStatus, table


def main() -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", nargs="+", type=Path, help="such as runs/loco_r50_800ep")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two looks")
    arguments = parser.parse_args()
    console = Console()
    try:
        runs = [RunStatus(run_dir) for run_dir in arguments.run_dir]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not console.is_terminal:
        console.print(table(runs))
        return 0
    with (
        contextlib.suppress(KeyboardInterrupt),
        Live(table(runs), console=console, auto_refresh=False) as live,
    ):
        while True:
            time.sleep(arguments.every)
            live.update(table(runs), refresh=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
