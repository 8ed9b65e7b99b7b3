"""A picture of a plan, after LoCo's Figure 1: segments, windows, gradient boundaries, losses."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from framework.cost.counting import PlanCost, UnitCost
from framework.runtime.files import write_whole

_FORWARD, _BACKWARD, _LOSS = "#4c6a92", "#c44e52", "#dd8452"
_READABLE = 16  # segments whose names fit under their boxes


def draw_plan(cost: PlanCost, picture: Path, title: str = "") -> None:
    """Write ``plan_figure`` as a PNG.

    Args:
        cost: the plan, with sizes.
        picture: the PNG to write.
        title: above the picture.

    Raises:
        UserError: it can't be written.
    """
    drawn = io.BytesIO()
    plan_figure(cost, title).savefig(drawn, format="png")
    write_whole(picture, drawn.getvalue())


def plan_figure(cost: PlanCost, title: str = "") -> Figure:
    """Draw the network from left to right, and above it every unit's window, each in a lane that is free there.

    The arrow in a window is its gradient: it starts at the loss and ends at the gradient boundary.

    Args:
        cost: the plan, with sizes.
        title: above the picture.
    """
    lanes = _lanes(cost.units)
    height = max(lanes) + 1
    width = len(cost.segments)
    figure = Figure(figsize=(min(16, 2.5 + 1.1 * width), 1.6 + 0.45 * height), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    _draw_segments(axes, cost)
    for unit, lane in zip(cost.units, lanes, strict=True):
        _draw_unit(axes, unit, lane + 1, weighted=unit.weight != 1 and width <= _READABLE)
    axes.set_xlim(-0.6, width - 0.2)
    axes.set_ylim(-0.75, height + 0.7)
    axes.axis("off")
    axes.set_title(title, loc="left", fontsize=11)
    return figure


def _lanes(units: tuple[UnitCost, ...]) -> list[int]:
    """Lowest lane in which no earlier unit overlaps; short windows first, so that they lie lowest."""
    taken: list[list[UnitCost]] = []
    lanes = {}
    for unit in sorted(units, key=lambda u: (u.last - u.first, u.first)):
        free = (
            i for i, lane in enumerate(taken) if all(u.last < unit.first or unit.last < u.first for u in lane)
        )
        lane = next(free, len(taken))
        taken += [[]] if lane == len(taken) else []
        taken[lane].append(unit)
        lanes[unit] = lane
    return [lanes[unit] for unit in units]


def _draw_segments(axes: Axes, cost: PlanCost) -> None:
    largest = max(s.activation_bytes for s in cost.segments)
    for i, segment in enumerate(cost.segments):
        share = segment.activation_bytes / largest
        box = FancyBboxPatch((i - 0.36, -0.28), 0.72, 0.56, boxstyle="round,pad=0,rounding_size=0.08")
        box.set(facecolor=_FORWARD, alpha=0.25 + 0.6 * share, edgecolor="none")
        axes.add_patch(box)
        if len(cost.segments) <= _READABLE or i % max(1, len(cost.segments) // 8) == 0:
            axes.text(i, -0.42, segment.name, ha="center", va="top", fontsize=8)
        if i:
            axes.annotate(
                "", (i - 0.36, 0), (i - 0.64, 0), arrowprops={"arrowstyle": "->", "color": _FORWARD}
            )


def _draw_unit(axes: Axes, unit: UnitCost, y: float, weighted: bool) -> None:
    left, right = unit.first - 0.36, unit.last + 0.36
    axes.annotate(
        "", (left, y), (right, y), arrowprops={"arrowstyle": "-|>", "color": _BACKWARD, "linewidth": 1.4}
    )
    axes.plot([left, left], [y - 0.22, y + 0.22], color=_BACKWARD, linewidth=2.2)
    axes.plot([right], [y], marker="o", markersize=7, color=_LOSS)
    if weighted:
        axes.text(
            right + 0.06, y + 0.12, f"x {unit.weight:g}", fontsize=7, va="bottom", ha="right", color="0.25"
        )
