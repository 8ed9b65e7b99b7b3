"""A table of results of one row that trains some seconds on digits, and runs of it that have ended."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path
from typing import Any

from framework.analysis import results_records
from framework.analysis.results_runs import RowRun
from framework.analysis.results_tables import ResultsTable
from framework.config import loading
from framework.tracking.metric_log import MetricLog
from tests.support.commands import run_tool
from tests.support.runs import ROOT


def table(folder: Path, *more: str) -> Path:
    """A table of one row that trains some seconds on digits."""
    recipe = ROOT / "recipes" / "quickstart_mlaan.yaml"
    short = [
        "train.epochs=12",
        "engine=ddp",
        "network.name=resnet8",
        "evaluate.every_epochs=6",
        "data.fraction=0.5",
    ]
    rows = [{"name": "DGL* K=2", "recipe": str(recipe), "paper": 1.5}]
    path = folder / "results" / "digits.yaml"
    path.parent.mkdir(exist_ok=True)
    overrides = [*short, "evaluate.knn=false", *more]
    path.write_text(
        json.dumps({"title": "digits", "score": "test_top1", "overrides": overrides, "rows": rows})
    )
    return path


def reproduce(*arguments: str) -> object:
    """Exit status of the tool."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        return run_tool("reproduce", *arguments)
    finally:
        signal.signal(signal.SIGTERM, before)


def finish(run: RowRun, device: str = "CPU") -> None:
    """The files of a run that has ended."""
    run.folder.mkdir(parents=True)
    (run.folder / "recipe.yaml").write_text(loading.to_yaml(loading.load(run.steps[0].command[1:])))
    environment = {"device": device, "threads": 3, "commit": "c"}
    log = MetricLog(run.folder / "metrics.jsonl", environment)
    for step, loss in enumerate((2.0, 1.0)):
        log.write(step, epoch=step / 2, lr=0.1, losses={"unit": loss}, images_per_second=10.0)
    log.close()
    result = {"test_top1": 90.0, "train_images": 64, "epochs": 1.0}
    (run.folder / "result.json").write_text(json.dumps(result))


def named(path: Path, *names: str, **more: Any) -> ResultsTable:
    """Write and read a table with such rows."""
    table(path.parent.parent)
    (row,) = json.loads(path.read_text())["rows"]
    rows = [row | {"name": name} for name in names]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rows": rows} | more))
    return ResultsTable.read(path)


def write_down(path: Path, found: ResultsTable, ended: list[RowRun]) -> list[str]:
    """Rows of the CSV after it is written."""
    results_records.write_down(path, found, ended)
    return [line["row"] for line in csv.DictReader((path.parent / "digits-cpu.csv").open())]
