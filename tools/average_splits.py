"""Average the AP of a detector over the subsets that it was trained on: LoCo's Table 3.

    python tools/average_splits.py runs/detectron2/coco_10k_finetune

reads split1/result.json, split2/result.json ..., prints every split's AP with mean and spread, and writes average.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from framework.runtime.command import Parser, status
from framework.runtime.errors import UserError

COLUMNS = [(task, key) for task in ("bbox", "segm") for key in ("AP", "AP50", "AP75")]
LABELS = {"bbox": "box", "segm": "mask"}


def main() -> None:
    """Average."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="OUTPUT_DIR of the runs, with split1, split2 ... in it")
    run = parser.parse_args().run

    from framework.tracking.metric_log import write_result

    results = read(run)
    average = summarize(results)
    write_result(run / "average.json", average)
    _show(results, average)


def read(run: Path) -> dict[str, dict[str, Any]]:
    """Results by split.

    Raises:
        UserError: there is none, one is missing or damaged, or they do not belong together.
    """
    folders = [folder for folder in run.glob("split*") if re.fullmatch(r"split\d+", folder.name)]
    results = {}
    for folder in sorted(folders, key=lambda f: int(f.name.removeprefix("split"))):
        path = folder / "result.json"
        try:
            results[folder.name] = json.loads(path.read_text())
        except OSError as error:
            raise UserError(
                f"{path}: can't be read ({error.strerror}): has this split been evaluated?"
            ) from error
        except ValueError as error:
            raise UserError(f"{path}: damaged") from error
    if not results:
        raise UserError(f"{run}: holds no split1, split2 ...")
    first, reference = next(iter(results.items()))
    for split, result in results.items():
        if result["test"] != reference["test"]:
            raise UserError(f"{run}: {split} was tested on {result['test']}, {first} on {reference['test']}")
    return results


def summarize(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread (largest minus smallest) of every AP that all splits have."""
    summary: dict[str, Any] = {"splits": list(results)}
    for task, key in COLUMNS:
        values = [result.get(task, {}).get(key) for result in results.values()]
        if None not in values:
            summary.setdefault(task, {})[key] = {
                "mean": float(np.mean(values)),
                "spread": float(np.ptp(values)),
            }
    return summary


def _show(results: dict[str, dict[str, Any]], average: dict[str, Any]) -> None:
    table = Table()
    table.add_column("split")
    for task, key in COLUMNS:
        table.add_column(f"{LABELS[task]} {key}", justify="right")
    for split, result in results.items():
        table.add_row(split, *(_number(result.get(task, {}).get(key)) for task, key in COLUMNS))
    table.add_section()
    for statistic in ("mean", "spread"):
        cells = (average.get(task, {}).get(key, {}).get(statistic) for task, key in COLUMNS)
        table.add_row(statistic, *map(_number, cells))
    Console().print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(status(main))
