"""What of a table is already written down, and how long the rest will take."""

from __future__ import annotations

import csv
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from framework.analysis.results_records import csv_of
from framework.analysis.results_runs import RowRun, fits, settings_of
from framework.config import loading
from framework.config.renamed import dotted_up_to_date
from framework.runtime.files import read_object
from framework.tracking.metric_log import read_log

#: what numbers depend on; the rest of a recipe says where, how often and how quickly
SECTIONS = (
    *("network.", "method.", "views.", "optim.", "train.", "seed"),
    *("data.train", "data.test", "data.fraction", "data.image_size", "data.num_classes"),
)


def recorded_lines(path: Path, device: str) -> list[dict[str, str]]:
    """Lines of the CSV of a table on a device; none if there is no CSV."""
    written = csv_of(path, device)
    return list(csv.DictReader(written.read_text().splitlines())) if written.exists() else []


def is_recorded(run: RowRun, lines: Sequence[dict[str, str]], folder: Path) -> tuple[bool, str]:
    """Whether a CSV has a run with all its results, and if not although it has a line, why.

    Args:
        run: of the table.
        lines: of the CSV.
        folder: the CSV's, from which its lines name logs.
    """
    line = next(
        (line for line in lines if (line["row"], line["seed"]) == (run.row.name, str(run.seed))), None
    )
    if line is None or not (folder / line["log"]).exists():
        return False, ""
    with (folder / line["log"]).open() as file:
        log = json.loads(next(file))
    if len(log["results"]) != len(run.steps):
        return False, f"has {len(log['results'])} of {len(run.steps)} results"
    for step, found in zip(run.steps, log["results"], strict=True):
        if not fits(found, run.asked(step.kind)):
            return False, f"is of another {step.kind}"
    there, here = dotted_up_to_date(log["settings"]), settings_of(loading.to_yaml(run.recipe))
    for key in sorted(there.keys() & here.keys()):
        left_open = there[key] is None or here[key] is None  # to a default of that time
        if key.startswith(SECTIONS) and there[key] != here[key] and not left_open:
            return False, f"had {key}={there[key]}, and the table has {here[key]}"
    return True, ""


def seconds_left(run: RowRun, lines: Sequence[dict[str, str]]) -> float | None:
    """Of a run, by its own steps or else by lines of the same row; ``None`` if there are neither.

    Lines that don't tell their seconds count the training's alone.
    """
    log = run.folder / "metrics.jsonl"
    entries = [e for e in read_log(log) if e.get("images_per_second")] if log.exists() else []
    if entries:
        rate = statistics.median(entry["images_per_second"] for entry in entries)
        done = entries[-1]["epoch"]
        images = run.recipe.train.batch_size * (entries[-1]["step"] + 1) / done
        return float(max(0.0, run.recipe.train.epochs - done) * images / rate)
    found = [_seconds(line) for line in lines if line["row"] == run.row.name]
    return statistics.median(found) if found else None


def measured_seconds(run: RowRun, train: Any) -> float | None:
    """Of a run's training, by a few steps in a folder of their own; ``None`` if they fail.

    Args:
        run: not begun.
        train: runs a command and returns its exit status.
    """
    with tempfile.TemporaryDirectory() as folder:
        mine = {"train.max_steps": "6", "evaluate.knn": "false", "run_dir": str(Path(folder, "run"))}
        script, recipe, *settings = run.steps[0].command
        kept = [text for text in settings if text.split("=")[0] not in {*mine, "evaluate.every_epochs"}]
        if train([script, recipe, *kept, *(f"{key}={value}" for key, value in mine.items())]):
            return None
        result = read_object(Path(folder, "run", "result.json"))
        return float(result["train_images"] * run.recipe.train.epochs / result["images_per_second"])


def _seconds(line: dict[str, str]) -> float:
    if line.get("seconds"):
        return float(line["seconds"])
    return float(line["train_images"]) * float(line["epochs"]) / float(line["images_per_second"])
