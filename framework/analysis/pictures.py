"""What all pictures have in common."""

from __future__ import annotations

import io

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colors, told apart with any color vision.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def run_colors(count: int) -> list[str]:
    """A color for each of ``count`` runs."""
    return [_COLORS[i % len(_COLORS)] for i in range(count)]


def png(figure: Figure, dpi: float | str = "figure") -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def dress(axes: Axes, title: str, x: str, y: str) -> None:
    """Title, labels of both axes, a light grid, no box."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)


def segment_ticks(axes: Axes, names: list[str]) -> None:
    """Segments along the x axis, by name; only as many as can be read."""
    every = max(1, -(-len(names) // 16))
    shown = list(range(0, len(names), every))
    longest = max(map(len, names))
    axes.set_xticks(shown, [names[i] for i in shown], rotation=45 if longest * len(shown) > 60 else 0)
