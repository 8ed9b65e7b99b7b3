"""What is kept of the runs of a table: a line of a CSV, a log, a curve for each."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import math
import re
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

from framework.analysis.curves import read_losses, read_scores
from framework.analysis.results_pictures import pictures_of
from framework.analysis.results_runs import RowRun, settings_of
from framework.analysis.results_tables import ResultsTable
from framework.config import loading
from framework.runtime.errors import UserError
from framework.runtime.files import write_whole
from framework.tracking.metric_log import read_log

POINTS = 50  # of a curve in a log


class Record:
    """What is kept of a run that has ended.

    Args:
        run: the run; its folder holds the results of all its commands.
    """

    def __init__(self, run: RowRun) -> None:
        self.run, self._log = run, run.folder / "metrics.jsonl"
        self._entries = read_log(self._log)

    def environment(self, key: str) -> str:
        """Such as "device"; all values, if pieces of the run had several."""
        found = (str(entry["environment"][key]) for entry in self._entries if "environment" in entry)
        return " and ".join(dict.fromkeys(found))

    @cached_property
    def scores(self) -> dict[str, tuple[list[float], list[float]]]:
        """Accuracies that were measured during the training: name -> (epochs, per cent)."""
        return read_scores(self._log)

    def losses(self) -> list[tuple[float, dict[str, float]]]:
        """Mean losses of the units over parts of the training, by the epoch at the end of the part."""
        losses, epochs = read_losses(self._log), self.run.results[0]["epochs"]
        steps = len(losses.steps)
        ends = sorted({math.ceil(steps * (i + 1) / POINTS) for i in range(POINTS)})
        parts = [
            (end, losses.values[start:end].mean(0)) for start, end in zip([0, *ends], ends, strict=False)
        ]
        return [
            (round(epochs * end / steps, 3), dict(zip(losses.units, means.round(4).tolist(), strict=True)))
            for end, means in parts
        ]

    def line(self, score: str, log: Path) -> dict[str, Any]:
        """The line of the CSV: errors and accuracies in per cent, conditions, environment."""
        left = {step.kind: found for step, found in zip(self.run.steps, self.run.results, strict=True)}
        result = left["training"]
        accuracies = {key: value for key, value in result.items() if "top1" in key}
        if found := left.get("linear evaluation"):
            accuracies |= {"linear_top1": found["top1"], "linear_top1_random": found["top1_random_encoder"]}
        if found := left.get("probes"):
            (of_layers,) = (list(top1.values()) for top1 in found["top1"].values())
            early = of_layers[: math.ceil(len(of_layers) / 3)]
            accuracies["early_top1"] = round(statistics.fmean(early), 2)
        if found := left.get("CKA"):
            accuracies["cka"] = round(found["runs"][0]["mean"], 4)
        during = self.scores[score][1] if score == "test_top1" and score in self.scores else []
        recipe = loading.load([str(self.run.folder / "recipe.yaml")])
        speeds = [entry["images_per_second"] for entry in self._entries if "images_per_second" in entry]
        return {
            "row": self.run.row.name,
            "seed": self.run.seed,
            "error": round(100 - accuracies[score], 2),
            "best_error": round(100 - max([*during, accuracies[score]]), 2),
            "paper_error": self.run.row.paper,
            **accuracies,
            "train_images": result["train_images"],
            "epochs": result["epochs"],
            "batch_size": recipe.train.batch_size,
            "precision": recipe.train.precision,
            "images_per_second": round(statistics.median(speeds), 2),
            "seconds": round(
                result["train_images"] * result["epochs"] / statistics.median(speeds)
                + sum(found.get("seconds", 0.0) for found in left.values())
            ),
            "device": self.environment("device"),
            "threads": self.environment("threads"),
            "commit": self.environment("commit"),
            "log": str(log),
        }

    def text(self) -> str:
        """The log, in lines of JSON: commands, settings and results; accuracies; losses."""
        first = {
            "commands": self.run.shown(self.environment("threads")),
            "results": [_without_matrices(found) for found in self.run.results],
            "settings": settings_of((self.run.folder / "recipe.yaml").read_text()),
        }
        scores = [{"scores": {key: {"epochs": e, "top1": s}}} for key, (e, s) in self.scores.items()]
        losses = [{"epoch": epoch, "losses": means} for epoch, means in self.losses()]
        return "".join(json.dumps(line) + "\n" for line in [first, *scores, *losses])


def _without_matrices(found: dict[str, Any]) -> dict[str, Any]:
    """A result without CKA's whole matrices."""
    if "segments" not in found:
        return found
    return found | {"runs": [{k: v for k, v in run.items() if k != "matrix"} for run in found["runs"]]}


def csv_of(path: Path, device: str) -> Path:
    """The CSV of a table's runs on a device."""
    return path.with_name(f"{path.stem}-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.csv")


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[TextIO]:
    """A lock beside a file or folder, until this and whichever process it was handed to let go of it.

    Raises:
        UserError: another has it, and this is not to wait, which passes; or there can be none.
    """
    name = path.with_name(f".{path.name}.lock")
    try:
        name.parent.mkdir(parents=True, exist_ok=True)
        lock = name.open("w")
    except OSError as error:
        raise UserError(f"{name}: can't be written: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise UserError(f"{path}: skipped, for another process trains there") from error
        yield lock


def write_down(path: Path, table: ResultsTable, ended: list[RowRun]) -> list[dict[str, Any]]:
    """Write CSV, curves and logs of the runs that ended, on every device; returns the lines of all CSVs.

    Raises:
        UserError: a line that stays has lost its log; nothing is written.
    """
    groups: dict[Path, list[Record]] = {}
    for record in map(Record, ended):
        groups.setdefault(csv_of(path, record.environment("device")), []).append(record)
    with locked(path, wait=True):
        lines = {written: _merged(written, table, group) for written, group in groups.items()}
        for written, group in groups.items():
            for record in group:
                write_whole(path.parent / _log_of(written, record), record.text())
            buffer = io.StringIO()
            keys = dict.fromkeys(key for line in lines[written] for key in line)
            writer = csv.DictWriter(buffer, list(keys), lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines[written])
            write_whole(written, buffer.getvalue())
            for suffix, picture in pictures_of(written.parent, table, lines[written]).items():
                write_whole(written.with_name(f"{written.stem}{suffix}.png"), picture)
    return [line for group in lines.values() for line in group]


def _log_of(written: Path, record: Record) -> Path:
    """Where the log of a line of a CSV is, from the CSV's folder."""
    return Path("logs", written.stem, f"{record.run.folder.name}.jsonl")


def _merged(written: Path, table: ResultsTable, records: list[Record]) -> list[dict[str, Any]]:
    """Lines of these runs and, from the CSV, of those whose folders are elsewhere; last those not in the table.

    Raises:
        UserError: a line that stays has lost its log.
    """
    old = list(csv.DictReader(written.read_text().splitlines())) if written.exists() else []
    lines: dict[tuple[str, str], dict[str, Any]] = {(line["row"], line["seed"]): line for line in old}
    new = {
        (record.run.row.name, str(record.run.seed)): record.line(table.score, _log_of(written, record))
        for record in records
    }
    lines |= new
    wanted = [(row.name, str(seed)) for seed in table.seeds for row in table.rows]
    ordered = [lines[key] for key in wanted if key in lines]
    for key, line in lines.items():
        if key in wanted and key not in new and not (written.parent / line["log"]).exists():
            raise UserError(f"{written}: {line['log']} is missing: restore it, or remove the line {key[0]!r}")
    logs = {line["log"] for line in ordered}  # a row may have been renamed to one of the same log
    others = [line for key, line in lines.items() if key not in wanted and line["log"] not in logs]
    for line in others:
        fate = "kept; remove its log to drop it" if (written.parent / line["log"]).exists() else "dropped"
        print(
            f"warning: {written}: {line['row']!r}, seed {line['seed']}, is not in the table: {fate}",
            file=sys.stderr,
        )
    return ordered + [line for line in others if (written.parent / line["log"]).exists()]
