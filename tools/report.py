"""One HTML page about one or several runs, with everything inside: it opens offline, and on a phone.

    python tools/report.py RUN [RUN ...] [-o report.html]

It shows plans, losses, throughput, memory, scores, what other tools left in the runs' analysis folders, the
environment and the recipes. Runs may still be training.
"""

from __future__ import annotations

import sys
from pathlib import Path

from framework.analysis.arguments import parse, run_parser
from framework.runtime.command import status
from framework.runtime.files import write_whole


def main() -> None:
    """Write the page."""
    parser = run_parser(__doc__)
    parser.add_argument("-o", "--output", type=Path, help="the page; default: report.html in the first run")
    arguments = parse(parser)

    from framework.analysis.report import write_report

    path: Path = arguments.output or arguments.runs[0].folder / "report.html"
    write_whole(path, write_report(arguments.runs))
    print(f"written: {path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    sys.exit(status(main))
