"""What a person looks at: the progress bar while a run lasts, the loss curves afterwards."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from framework.errors import UserError
from framework.metrics import read_log

LEGEND_LIMIT = 12  # more units than that get a colour bar over depth instead of a legend


class Progress:
    """A bar with every unit's loss and images/s; plain lines now and then where there is no terminal.

    Args:
        steps: steps of the whole run.
        start: steps that are done already.
        enabled: show anything at all; one rank does.
        console: where to print; standard output by default.
        interval: seconds between two plain lines; the first and the last step always get one.
    """

    def __init__(
        self,
        steps: int,
        start: int = 0,
        *,
        enabled: bool = True,
        console: Console | None = None,
        interval: float = 10.0,
    ) -> None:
        self._steps, self._enabled, self._interval = steps, enabled, interval
        self._console = console or Console()
        self._printed = -math.inf
        self._bar = RichProgress(
            TextColumn("epoch {task.fields[epoch]:.1f}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]:.0f} images/s"),
            TimeRemainingColumn(),
        )
        self._task = self._bar.add_task("", total=steps, completed=start, epoch=0.0, speed=0.0)
        self._live = Live(self._bar, console=self._console, refresh_per_second=4)

    def __enter__(self) -> Progress:
        if self._enabled and self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._enabled and self._console.is_terminal:
            self._live.stop()

    def update(self, step: int, epoch: float, losses: Mapping[str, float], images_per_second: float) -> None:
        """Show that step ``step`` (counted from 0) is done."""
        if not self._enabled:
            return
        text = "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        if self._console.is_terminal:
            self._bar.update(self._task, completed=step + 1, epoch=epoch, speed=images_per_second)
            self._live.update(Group(self._bar, Text(text, style="dim")))
            return
        now = time.monotonic()
        if now - self._printed >= self._interval or step + 1 == self._steps:
            self._printed = now
            head = f"step {step + 1}/{self._steps}  epoch {epoch:.1f}  {images_per_second:.0f} images/s"
            print(f"{head}  {text}", file=self._console.file, flush=True)


def loss_curves(log: Path, picture: Path, title: str = "") -> None:
    """Draw every unit's loss over the steps of a ``MetricLog``: low units dark, high ones light.

    Args:
        log: the JSONL file.
        picture: the PNG to write.
        title: above the picture.

    Raises:
        UserError: the log has no steps yet.
    """
    entries = [entry for entry in read_log(log) if "losses" in entry]
    if not entries:
        raise UserError(f"{log}: no steps to draw")
    steps = np.array([entry["step"] for entry in entries])
    names = list(entries[-1]["losses"])
    losses = np.array([[entry["losses"].get(name) for name in names] for entry in entries], dtype=float)
    smooth = _smooth(losses)
    colors = colormaps["viridis"](np.linspace(0.05, 0.85, len(names)))

    figure = Figure(figsize=(7.5, 4.2), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    for name, raw, line, color in zip(names, losses.T, smooth.T, colors, strict=True):
        axes.plot(steps, raw, color=color, alpha=0.18, linewidth=0.7, zorder=1)
        axes.plot(steps, line, color=color, linewidth=1.8 if len(names) <= LEGEND_LIMIT else 1.1, label=name)
    _dress(axes, smooth, title)
    if len(names) <= LEGEND_LIMIT:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, title="unit")
    else:
        _color_bar(figure, axes, names, colors)
    figure.savefig(picture)


def _smooth(losses: np.ndarray) -> np.ndarray:
    """Centred moving average of (T, U) losses over a fortieth of the steps, or what of them there is."""
    window = np.ones(max(1, len(losses) // 40))
    there = np.isfinite(losses)
    total, count = (
        np.stack([np.convolve(column, window, "same") for column in columns.T], axis=1)
        for columns in (np.where(there, losses, 0.0), there.astype(float))
    )
    return np.divide(total, count, out=np.full_like(total, np.nan), where=there)


def _dress(axes: Axes, smooth: np.ndarray, title: str) -> None:
    finite = smooth[np.isfinite(smooth)]
    if finite.size and finite.min() > 0 and finite.max() > 8 * finite.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)


def _color_bar(figure: Figure, axes: Axes, names: list[str], colors: np.ndarray) -> None:
    units = len(names)
    norm = BoundaryNorm(np.arange(units + 1) - 0.5, units)
    bar = figure.colorbar(ScalarMappable(norm, ListedColormap(colors)), ax=axes, label="unit")
    ticks = np.unique(np.linspace(0, units - 1, 8).round().astype(int))
    bar.set_ticks(list(ticks), labels=[names[i] for i in ticks])
    bar.minorticks_off()
    bar.outline.set_visible(False)
