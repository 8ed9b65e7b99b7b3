"""What the folder of a run tells about it, while it runs and afterwards. Imports nothing that takes long."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from framework.runtime.errors import UserError

SILENT = 120.0  # seconds without an entry, or ten times the usual pause, after which a run counts as silent
LOSSES = 8  # units whose losses fit a cell


class RunStatus:
    """Follows a run; ``update`` reads what has been added to its log since.

    Attributes:
        last: the last entry of a step; empty before the first.
        starts: how often it was started.
        skipped_steps: float16 overflows, and steps that were not finite.

    Args:
        run_dir: folder of the run.

    Raises:
        UserError: it is none.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._log = run_dir / "metrics.jsonl"
        try:
            recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text())
        except (OSError, yaml.YAMLError) as error:
            raise UserError(f"{run_dir}: not the folder of a run: recipe.yaml can't be read") from error
        self._train, self._every = recipe["train"], recipe.get("logging", {}).get("every_steps", 1)
        self._begin()

    def _begin(self) -> None:
        self._offset = self.starts = self.skipped_steps = 0
        self._line = b""
        self.last: dict[str, Any] = {}

    def update(self) -> None:
        """Read on."""
        if not self._log.exists():
            return
        newest = b""
        with self._log.open("rb") as file:
            file.seek(self._offset - len(self._line))
            if file.read(len(self._line)) != self._line:  # a new start has cut it off, and written since
                self._begin()
                file.seek(0)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._line = line
                self._offset += len(line)
                self.starts += b'"environment"' in line
                self.skipped_steps += b'"skipped": true' in line
                newest = line if b'"losses"' in line else newest
        if newest:
            self.last = json.loads(newest)

    @property
    def steps(self) -> tuple[int, int]:
        """Steps done, and steps in all (0 if not known yet)."""
        if not self.last:
            return 0, 0
        done = self.last["step"] + 1
        in_all = round(done / self.last["epoch"]) * self._train["epochs"]
        return done, min(in_all, self._train["max_steps"] or in_all)

    @property
    def per_second(self) -> float:
        """Steps a second lately; 0 if not known."""
        return float(self.last.get("images_per_second") or 0) / self._train["batch_size"]

    @property
    def state(self) -> str:
        """``finished``, ``running``, or how long it has been silent."""
        if not self._log.exists():
            return "starting"
        result = (
            self.run_dir / "result.json"
        )  # one that is older than the log is of a shorter run, which goes on
        if result.exists() and result.stat().st_mtime >= self._log.stat().st_mtime:
            return "finished"
        age = time.time() - self._log.stat().st_mtime
        usual = self._every / self.per_second if self.per_second else 0.0
        return "running" if age < max(SILENT, 10 * usual) else f"silent for {_duration(age)}"

    @property
    def remaining(self) -> str:
        """Time to the end at the speed of late."""
        done, in_all = self.steps
        if self.state != "running" or not self.per_second:
            return "-"
        return _duration((in_all - done) / self.per_second)

    @property
    def losses(self) -> str:
        """The losses of the last entry; of many units those of some depths."""
        losses = list(self.last.get("losses", {}).items())
        shown = losses[:: -(-len(losses) // LOSSES)] if losses else []
        return "  ".join(f"{name} {'nan' if loss is None else f'{loss:.3f}'}" for name, loss in shown)

    @property
    def checkpoint(self) -> tuple[str, int]:
        """The newest checkpoint with its age, and the broken images up to it."""
        folders = sorted(self.run_dir.glob("checkpoints/step-*"), key=lambda f: int(f.name[5:]))
        for folder in reversed(folders):
            try:
                position = json.loads((folder / "state.json").read_text())["position"]
                age = time.time() - folder.stat().st_mtime
                return f"step {position['step']}, {_duration(age)} ago", position["broken"]
            except (OSError, ValueError, KeyError):  # just being deleted, or damaged
                continue
        return "none", 0


def table(runs: Sequence[RunStatus]) -> Table:
    """A line for each run, read anew."""
    grid = Table()
    for column in (
        "run",
        "state",
        "epoch",
        "step",
        "steps/s",
        "to go",
        "losses",
        "restarts",
        "skipped",
        "saved",
    ):
        right = column in ("epoch", "steps/s", "to go", "restarts")
        grid.add_column(column, justify="right" if right else "left", overflow="fold")
    for run in runs:
        run.update()
        done, in_all = run.steps
        saved, broken = run.checkpoint
        grid.add_row(
            run.run_dir.name,
            run.state,
            f"{run.last.get('epoch', 0):.1f}",
            f"{done}/{in_all}",
            f"{run.per_second:.2f}",
            run.remaining,
            run.losses,
            str(max(0, run.starts - 1)),
            f"{broken} images, {run.skipped_steps} steps",
            saved,
        )
    return grid


def _duration(seconds: float) -> str:
    """``3 days, 4:05:06`` without its fractions."""
    return str(timedelta(seconds=round(seconds)))
