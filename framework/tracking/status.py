"""What the folder of a run tells about it, while it runs and afterwards. Does without PyTorch."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from framework.runtime.errors import UserError
from framework.tracking.metric_log import read_entry

SILENT = 120.0  # seconds without an entry, or ten times the usual pause, after which a run counts as silent
LOSSES = 8  # units whose losses are shown


class RunStatus:
    """The state of a run; ``update`` reads what was added to its log since the last call.

    Attributes:
        last: the log's last entry of a step; empty before the first.
        starts: how often the run was started.
        skipped_steps: steps skipped for a float16 overflow, a loss or gradient that was not finite.

    Args:
        run_dir: folder of the run.

    Raises:
        UserError: it is not the folder of a run.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._log = run_dir / "metrics.jsonl"
        try:
            recipe = yaml.safe_load((run_dir / "recipe.yaml").read_bytes())
        except (OSError, yaml.YAMLError) as error:
            raise UserError(f"{run_dir}: not the folder of a run: recipe.yaml can't be read") from error
        if not isinstance(recipe, dict) or not isinstance(recipe.get("train"), dict):
            raise UserError(f"{run_dir}: not the folder of a run: recipe.yaml has no section train")
        self._train, self._every = recipe["train"], recipe.get("logging", {}).get("every_steps", 1)
        self._begin()

    def _begin(self) -> None:
        self._offset = self.starts = self.skipped_steps = 0
        self._line = b""
        self.last: dict[str, Any] = {}

    def update(self) -> None:
        """Read the rest of the log."""
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
            self.last = read_entry(newest, str(self._log))

    @property
    def epochs(self) -> int:
        """Of the whole run."""
        return int(self._train["epochs"])

    @property
    def steps(self) -> tuple[int, int]:
        """Steps done, and steps of the whole run (0 if not known yet)."""
        if not self.last:
            return 0, 0
        done = self.last["step"] + 1
        in_all = round(done / self.last["epoch"]) * self._train["epochs"]
        return done, min(in_all, self._train["max_steps"] or in_all)

    @property
    def per_second(self) -> float:
        """Steps a second at the last entry; 0 if not known."""
        return float(self.last.get("images_per_second") or 0) / self._train["batch_size"]

    @property
    def loader_wait(self) -> float | None:
        """Share of the time of the last steps in which training waited for the loader; logs of before lack it."""
        wait: float | None = self.last.get("loader_wait")
        return wait

    @property
    def state(self) -> str:
        """``starting``, ``running``, ``finished``, or for how long nothing was logged."""
        if not self._log.exists():
            return "starting"
        result = self.run_dir / "result.json"
        # One that is older than the log is the result of a shorter run, which now goes on.
        if result.exists() and result.stat().st_mtime >= self._log.stat().st_mtime:
            return "finished"
        age = time.time() - self._log.stat().st_mtime
        usual = self._every / self.per_second if self.per_second else 0.0
        return "running" if age < max(SILENT, 10 * usual) else f"silent for {_duration(age)}"

    @property
    def remaining(self) -> str:
        """Time to the end at the present speed; empty if not known."""
        done, in_all = self.steps
        if self.state != "running" or not self.per_second:
            return ""
        return _duration((in_all - done) / self.per_second)

    @property
    def losses(self) -> list[str]:
        """Losses of the last entry, with the names of their units; of many units evenly spaced ones."""
        losses = list(self.last.get("losses", {}).items())
        shown = losses[:: -(-len(losses) // LOSSES)] if losses else []
        return [f"{name} {'nan' if loss is None else f'{loss:.3f}'}" for name, loss in shown]

    @property
    def checkpoint(self) -> tuple[str, int]:
        """The newest checkpoint with its age, and how many broken images had been left out by then."""
        folders = sorted(self.run_dir.glob("checkpoints/step-*"), key=lambda f: int(f.name[5:]))
        for folder in reversed(folders):
            try:
                position = json.loads((folder / "state.json").read_text())["position"]
                age = time.time() - folder.stat().st_mtime
                return f"step {position['step']}, {_duration(age)} ago", position["broken"]
            except (OSError, ValueError, KeyError):  # just being deleted, or damaged
                continue
        return "none", 0


def overview(runs: Sequence[RunStatus]) -> Group:
    """A few lines for each run, read anew; they fit a terminal of 80 columns."""
    return Group(*(_lines(run) for run in runs))


def _lines(run: RunStatus) -> RenderableType:
    run.update()
    done, in_all = run.steps
    progress = [
        f"epoch {run.last.get('epoch', 0):.1f} of {run.epochs}",
        f"step {done} of {in_all or '?'}",
        *([f"{run.per_second:.2f} steps/s"] if run.per_second else []),
        *([f"{run.remaining} to go"] if run.remaining else []),
        *([f"{run.loader_wait:.0%} waiting for data"] if run.loader_wait is not None else []),
    ]
    saved, broken = run.checkpoint
    grid = Table.grid(padding=(0, 1), pad_edge=True)
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    grid.add_row("progress", ", ".join(progress))
    grid.add_row("losses", Columns(run.losses, padding=(0, 2)) if run.losses else "none yet")
    grid.add_row("saved", saved)
    skipped = f"skipped: {broken} images, {run.skipped_steps} steps"
    grid.add_row("restarts", f"{max(0, run.starts - 1)}, {skipped}")
    return Group(Text(f"{run.run_dir.name}: {run.state}", style="bold"), grid)


def _duration(seconds: float) -> str:
    """``3 days, 4:05:06`` without its fractions."""
    return str(timedelta(seconds=round(seconds)))
