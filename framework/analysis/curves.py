"""Loss curves: every unit of one run, or of several side by side (LoCo's training-curve figure)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter

from framework.analysis.pictures import dress, png, run_colors
from framework.runtime.errors import UserError
from framework.tracking.metric_log import read_log

LEGEND_LIMIT = 12  # more units than that get a color bar over depth instead of a legend


class Losses(NamedTuple):
    """The losses of a run.

    Attributes:
        steps: (T,) numbers of the steps.
        units: U names, from the lowest to the highest.
        values: (T, U); NaN where a loss was not finite.
    """

    steps: np.ndarray
    units: list[str]
    values: np.ndarray

    @property
    def trained(self) -> int:
        """How many steps, logged or not."""
        return int(self.steps[-1]) + 1

    def smooth(self) -> np.ndarray:
        """(T, U) centered moving average over a fortieth of the steps, or what of them there is."""
        window = np.ones(max(1, len(self.values) // 40))
        there = np.isfinite(self.values)
        total, count = (
            np.stack([np.convolve(column, window, "same") for column in columns.T], axis=1)
            for columns in (np.where(there, self.values, 0.0), there.astype(float))
        )
        return np.divide(total, count, out=np.full_like(total, np.nan), where=there)

    def summary(self) -> dict[str, Any]:
        """The last point of every smoothed curve, for JSON."""
        last = self.smooth()[-1].tolist()
        return {
            "steps": self.trained,
            "last_loss": {n: v if np.isfinite(v) else None for n, v in zip(self.units, last, strict=True)},
        }


def read_losses(log: Path) -> Losses:
    """The losses in a ``MetricLog``.

    Raises:
        UserError: there is no such file, or no step in it.
    """
    if not log.exists():
        raise UserError(f"{log}: no such file, so there are no losses to draw")
    entries = [entry for entry in read_log(log) if "losses" in entry]
    if not entries:
        raise UserError(f"{log}: no steps to draw")
    names = list(entries[-1]["losses"])
    values = [[entry["losses"].get(name) for name in names] for entry in entries]
    return Losses(np.array([entry["step"] for entry in entries]), names, np.array(values, dtype=float))


def read_scores(log: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Accuracies measured during training: name -> (epochs, per cent); empty if there are none."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for entry in read_log(log):
        for name, value in entry.get("scores", {}).items():
            epochs, values = curves.setdefault(name, ([], []))
            epochs.append(entry["epoch"])
            values.append(value)
    return curves


def loss_curves(log: Path, title: str = "") -> bytes:
    """A PNG of every unit's loss over the steps of a ``MetricLog``: low units dark, high ones light.

    Args:
        log: the JSONL file.
        title: above the picture.

    Raises:
        UserError: the log has no steps yet.
    """
    losses = read_losses(log)
    figure = Figure(figsize=(7.5, 4.2), dpi=160, layout="constrained")
    draw_units(figure, figure.add_subplot(), losses, title)
    return png(figure)


def compare_curves(runs: Mapping[str, Losses]) -> Figure:
    """The highest unit of every run in one panel, and beside it every unit of each run, on one scale."""
    count = len(runs) + 1
    columns = count if count <= 3 else 2
    rows = -(-count // columns)
    figure = Figure(figsize=(5.2 * columns, 3.6 * rows), dpi=150, layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    axes: list[Axes] = list(grid.flat)
    for (name, losses), color in zip(runs.items(), run_colors(len(runs)), strict=True):
        axes[0].plot(losses.steps, losses.values[:, -1], color=color, alpha=0.15, linewidth=0.7)
        axes[0].plot(losses.steps, losses.smooth()[:, -1], color=color, linewidth=1.8, label=name)
    dress(axes[0], "highest unit of every run", "step", "loss")
    axes[0].legend(frameon=False)
    for panel, run in zip_longest(axes[1:], runs.items()):
        if run is None:
            panel.set_axis_off()
        else:
            draw_units(figure, panel, run[1], run[0], inside=True)
    shown = np.concatenate([losses.smooth().ravel() for losses in runs.values()])
    _scale(axes[0], shown)
    return figure


def score_curves(runs: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]) -> Figure:
    """Accuracies over epochs: a color is a run, a line style a score."""
    figure = Figure(figsize=(7.5, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    styles = {"knn_top1": "-", "linear_top1": "--", "test_top1": ":"}
    labels = {"knn_top1": "k-NN", "linear_top1": "linear probe", "test_top1": "classifier"}
    for (run, curves), color in zip(runs.items(), run_colors(len(runs)), strict=True):
        for name, (epochs, values) in curves.items():
            label = f"{run}: {labels[name]}" if len(runs) > 1 else labels[name]
            axes.plot(epochs, values, color=color, linestyle=styles[name], marker="o", ms=3.5, label=label)
    dress(axes, "measured during training", "epoch", "top-1 in %")
    axes.legend(frameon=False)
    return figure


def draw_units(figure: Figure, axes: Axes, losses: Losses, title: str, inside: bool = False) -> None:
    """One run: low units dark, high ones light; the legend stands inside the axes or to their right."""
    smooth, units = losses.smooth(), len(losses.units)
    colors = colormaps["viridis"](np.linspace(0.05, 0.85, units))
    for name, raw, line, color in zip(losses.units, losses.values.T, smooth.T, colors, strict=True):
        axes.plot(losses.steps, raw, color=color, alpha=0.18, linewidth=0.7, zorder=1)
        axes.plot(
            losses.steps, line, color=color, linewidth=1.8 if units <= LEGEND_LIMIT else 1.1, label=name
        )
    _scale(axes, smooth)
    dress(axes, title, "step", "loss")
    if units > LEGEND_LIMIT:
        _color_bar(figure, axes, losses.units, colors)
    elif inside:
        axes.legend(frameon=False, title="unit")
    else:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, title="unit")


def _scale(axes: Axes, smooth: np.ndarray) -> None:
    finite = smooth[np.isfinite(smooth)]
    if finite.size and finite.min() > 0 and finite.max() > 8 * finite.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))


def _color_bar(figure: Figure, axes: Axes, names: list[str], colors: np.ndarray) -> None:
    units = len(names)
    norm = BoundaryNorm(np.arange(units + 1) - 0.5, units)
    bar = figure.colorbar(ScalarMappable(norm, ListedColormap(colors)), ax=axes, label="unit")
    ticks = np.unique(np.linspace(0, units - 1, 8).round().astype(int))
    bar.set_ticks(list(ticks), labels=[names[i] for i in ticks])
    bar.minorticks_off()
    bar.outline.set_visible(False)
