"""Pictures of a table of results, from the logs of its lines."""

from __future__ import annotations

import json
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from framework.analysis.pictures import dress, png, run_colors, segment_ticks
from framework.analysis.results_tables import ResultsTable

Log = list[dict[str, Any]]


def pictures_of(folder: Path, table: ResultsTable, lines: Sequence[dict[str, Any]]) -> dict[str, bytes]:
    """PNGs, by what is appended to the CSV's name.

    ``""``: the last unit's loss, and the error where it was measured during training. ``"-units"``: the losses of all
    units, with the first seed (Figure 1 of LoCo's supplement). ``"-layers"``: probes and CKA of every segment, means
    over seeds (MLAAN Figures 5 and 6).

    Args:
        folder: that of the CSV, from which lines name their logs.
        table: gives title, rows and seeds.
        lines: of the CSV.
    """
    logs = [[json.loads(text) for text in (folder / line["log"]).read_text().splitlines()] for line in lines]
    figures = {"": _curves(table, lines, logs)}
    first = [number for number, line in enumerate(lines) if str(line["seed"]) == str(table.seeds[0])]
    if any(len(_losses(logs[number])[-1][1]) > 1 for number in first):
        figures["-units"] = _units(table, [lines[i] for i in first], [logs[i] for i in first])
    if any("segments" in found or "flatten" in found for log in logs for found in log[0]["results"]):
        figures["-layers"] = _layers(table, lines, logs)
    return {suffix: png(figure, dpi=110) for suffix, figure in figures.items()}


def _losses(log: Log) -> list[tuple[float, dict[str, float]]]:
    """The units' losses by epoch."""
    return [(entry["epoch"], entry["losses"]) for entry in log if "losses" in entry]


def _curves(table: ResultsTable, lines: Sequence[dict[str, Any]], logs: Sequence[Log]) -> Figure:
    """A color stands for a row, full strength for the first seed."""
    measured = any(table.score in entry.get("scores", ()) for log in logs for entry in log)
    figure = Figure(figsize=(10 if measured else 6.4, 4), layout="constrained")
    loss, *error = figure.subplots(1, 1 + measured, squeeze=False)[0]
    rows = list(dict.fromkeys([*(row.name for row in table.rows), *(line["row"] for line in lines)]))
    for line, log in zip(lines, logs, strict=True):
        number = rows.index(line["row"])  # Matplotlib has ten colors
        style: dict[str, Any] = {
            "color": f"C{number}",
            "linestyle": "--" if number > 9 else "-",
            "alpha": 0.4,
        }
        if str(line["seed"]) == str(table.seeds[0]):
            style |= {"alpha": 1.0, "label": line["row"]}
        means = [(epoch, list(losses.values())[-1]) for epoch, losses in _losses(log)]
        loss.plot(*zip(*means, strict=True), **style)
        for entry in log:
            if table.score in entry.get("scores", ()):
                curve = entry["scores"][table.score]
                error[0].plot(curve["epochs"], [100 - accuracy for accuracy in curve["top1"]], **style)
    loss.set(xlabel="epoch", ylabel="training loss of the last unit")
    loss.legend(fontsize="small")
    for axes in error:
        axes.set(xlabel="epoch", ylabel="test error in %")
    figure.suptitle(textwrap.fill(table.title, 100 if measured else 64))
    return figure


def _units(table: ResultsTable, lines: Sequence[dict[str, Any]], logs: Sequence[Log]) -> Figure:
    """A panel a row; the lighter a curve, the higher its unit."""
    columns = min(4, len(lines))
    rows = -(-len(lines) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.0 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for axes, line, log in zip(panels, lines, logs, strict=False):
        curves = _losses(log)
        units = list(curves[-1][1])
        for number, unit in enumerate(units):
            color = colormaps["viridis"](0.9 * number / max(1, len(units) - 1))
            axes.plot(*zip(*((epoch, means[unit]) for epoch, means in curves), strict=True), color=color)
        dress(axes, line["row"], "epoch", "training loss")
    for axes in panels[len(lines) :]:
        axes.set_visible(False)
    figure.suptitle(textwrap.fill(f"{table.title}: all units, seed {table.seeds[0]}", 40 * columns))
    return figure


def _layers(table: ResultsTable, lines: Sequence[dict[str, Any]], logs: Sequence[Log]) -> Figure:
    probes: dict[str, list[list[float]]] = {}
    alike: dict[str, list[list[float]]] = {}
    names: list[str] = []
    for line, log in zip(lines, logs, strict=True):
        for found in log[0]["results"]:
            if "flatten" in found:
                (of_segments,) = found["top1"].values()
                names = list(of_segments)
                probes.setdefault(line["row"], []).append(list(of_segments.values()))
            elif "segments" in found:
                alike.setdefault(line["row"], []).append(found["runs"][0]["same_segment"])
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    colors = dict(zip((row.name for row in table.rows), run_colors(len(table.rows)), strict=True))
    reference = table.layers.reference if table.layers is not None else ""
    titles = ("linear probe on every segment", f"similarity to {reference}, segment by segment")
    labels = ("accuracy in %", "linear CKA")
    for axes, of_rows, title, y in zip(figure.subplots(1, 2), (probes, alike), titles, labels, strict=True):
        for row, seeds in of_rows.items():
            means = [statistics.fmean(values) for values in zip(*seeds, strict=True)]
            label = f"{row} (n={len(seeds)})"
            axes.plot(range(len(means)), means, marker="o", ms=3, color=colors.get(row, "0.5"), label=label)
        dress(axes, title, "segment", y)
        segment_ticks(axes, names)
        if of_rows:
            axes.legend(frameon=False, fontsize="small")
    figure.suptitle(table.title)
    return figure
