"""Bring the tables of results in Markdown files up to date with the CSVs.

    python tools/results_text.py [FILE ...]

By default ``README.md`` and ``recipes/results/README.md``. Marks in the files say which tables
(``framework/analysis/results_text.py``).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from framework.runtime.command import Parser, status
from framework.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "recipes" / "results"
FILES = (ROOT / "README.md", RESULTS / "README.md")


def main() -> None:
    """Write the files anew."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=FILES)
    arguments = parser.parse_args()

    from framework.analysis.results_text import up_to_date
    from framework.runtime.files import write_whole

    for path in arguments.files:
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        before = path.read_text()
        after = up_to_date(before, RESULTS)
        if after != before:
            write_whole(path, after)
        print(f"{path}: {'written' if after != before else 'as it was'}")


if __name__ == "__main__":
    sys.exit(status(main))
