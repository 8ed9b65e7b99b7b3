"""What the commands on run folders in ``tools`` share: their arguments, and where numbers and pictures go.

Runs are opened, which takes PyTorch, once the arguments are known to be right.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from framework.runtime.command import Parser
from framework.runtime.errors import UserError
from framework.runtime.files import write_whole
from framework.tracking.metric_log import write_result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from framework.evaluation.run_folder import Run


def run_parser(description: str | None) -> Parser:
    """A parser for run folders, overrides of their recipes, and a folder for what is found."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = "a run folder such as runs/quickstart; after them key=value over their recipes, such as data.path=/data"
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help=what)
    parser.add_argument("--out", type=Path, help="folder for the results; default: in the first run")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # from the launcher
    return parser


def parse(parser: Parser, out: str = "analysis") -> argparse.Namespace:
    """Arguments with ``runs`` as opened ``Run``s and ``out`` as a folder, by default that one of the first run.

    Raises:
        UserError: as ``open_runs``.
    """
    arguments = parser.parse_intermixed_args()
    folders, overrides = folders_and_overrides(arguments.runs)
    from framework.evaluation.run_folder import open_runs

    arguments.runs = open_runs(folders, overrides)
    arguments.out = arguments.out or arguments.runs[0].folder / out
    return arguments


def folders_and_overrides(texts: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Run folders and overrides ``key=value``.

    Raises:
        UserError: no folder.
    """
    overrides = [text for text in texts if "=" in text and not Path(text).exists()]
    folders = [Path(text) for text in texts if text not in overrides]
    if not folders:
        raise UserError("name a run folder, such as runs/quickstart")
    return folders, overrides


def only_run(runs: list[Run]) -> Run:
    """The one run that was named.

    Raises:
        UserError: there are several.
    """
    if len(runs) > 1:
        raise UserError(f"one run folder at a time; {len(runs)} are given")
    return runs[0]


def leave(folder: Path, name: str, numbers: Mapping[str, Any], figure: Figure | None = None) -> None:
    """Write ``name.json`` and, for a picture, ``name.png``, each whole or not at all, and say where.

    Raises:
        UserError: the folder can't be written.
    """
    write_result(folder / f"{name}.json", numbers)
    written = f"{folder / name}.json"
    if figure is not None:
        from framework.analysis.pictures import png

        write_whole(folder / f"{name}.png", png(figure))
        written += f", {name}.png"
    print(f"written: {written}", flush=True)
