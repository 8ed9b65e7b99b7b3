"""What each stage did when: a picture, and a trace for ui.perfetto.dev or chrome://tracing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from framework.pipeline.scheduling.schedule import (
    Contrast,
    Forward,
    Heads,
    Instruction,
    LoadMicroBatch,
    OptimizerStep,
    ReduceGradients,
    Walk,
)
from framework.pipeline.scheduling.simulation import Event

_KINDS: dict[str, tuple[type[Instruction], ...]] = {
    "forward": (Forward,),
    "heads": (Heads, Contrast),
    "backward": (Walk,),
    "optimizer": (OptimizerStep, ReduceGradients, LoadMicroBatch),
}
_COLORS = {"forward": "#4c6a92", "heads": "#dd8452", "backward": "#c44e52", "optimizer": "#8c8c8c"}
WAITING = "message"


def kind_of(instruction: Instruction) -> str:
    """``forward``, ``heads``, ``backward``, ``optimizer``, or ``message``, which is not work."""
    return next((kind for kind, types in _KINDS.items() if isinstance(instruction, types)), WAITING)


def idle_fraction(events: Sequence[Event], skip: int = 1) -> float:
    """Share of the time in which a stage does no work, from the end of step ``skip - 1`` to the last step's."""
    begin, end, _ = window(events, skip)
    busy = sum(
        event.end - event.start
        for event in events
        if begin <= event.start and event.end <= end and kind_of(event.instruction) != WAITING
    )
    return 1 - busy / (end - begin)


def window(events: Sequence[Event], skip: int = 1) -> tuple[float, float, int]:
    """End of step ``skip - 1``, end of the last step, and the number of steps between them."""
    ends = [event.end for event in events if isinstance(event.instruction, OptimizerStep)]
    return ends[skip - 1], ends[-1], len(ends) - skip


def write_trace(stages: Sequence[Sequence[Event]], path: Path) -> None:
    """Write events as Chrome's trace format, a row a stage, in microseconds from the first."""
    zero = min(events[0].start for events in stages if events)
    entries = [
        {
            "name": type(event.instruction).__name__,
            "cat": kind_of(event.instruction),
            "ph": "X",
            "ts": (event.start - zero) * 1e6,
            "dur": (event.end - event.start) * 1e6,
            "pid": 0,
            "tid": stage,
            "args": event.instruction.kwargs,
        }
        for stage, events in enumerate(stages)
        for event in events
    ]
    names = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": stage, "args": {"name": f"stage {stage}"}}
        for stage in range(len(stages))
    ]
    path.write_text(json.dumps({"traceEvents": names + entries, "displayTimeUnit": "ms"}) + "\n")


def draw_timelines(
    runs: Mapping[str, Sequence[Sequence[Event]]], picture: Path, seconds: float | None = None
) -> None:
    """Draw runs below each other on one scale, a row a stage; white is waiting.

    Args:
        runs: events by stage, by title.
        picture: the PNG to write.
        seconds: how much of each run to draw, from its first event; all by default.
    """
    rows = sum(len(stages) for stages in runs.values())
    figure = Figure(figsize=(9, 0.6 + 0.45 * len(runs) + 0.32 * rows), dpi=120, layout="constrained")
    ratios = [len(stages) for stages in runs.values()]
    panels = figure.subplots(len(runs), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    for axes, (title, stages) in zip(panels, runs.items(), strict=True):
        zero = min(events[0].start for events in stages)
        for stage, events in enumerate(stages):
            for kind, color in _COLORS.items():
                bars = [
                    (event.start - zero, event.end - event.start)
                    for event in events
                    if kind_of(event.instruction) == kind
                    and (seconds is None or event.start - zero < seconds)
                ]
                axes.broken_barh(
                    bars, (stage - 0.42, 0.84), facecolors=color, edgecolor="white", linewidth=0.3
                )
        axes.set_yticks(range(len(stages)), [f"stage {stage}" for stage in range(len(stages))], fontsize=8)
        axes.set_title(title, loc="left", fontsize=9)
        axes.invert_yaxis()
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        if seconds is not None:
            axes.set_xlim(0, seconds)
    panels[-1].set_xlabel("seconds")
    legend = [Patch(color=color, label=kind) for kind, color in _COLORS.items()]
    figure.legend(handles=legend, loc="outside lower right", ncols=len(legend), frameon=False, fontsize=8)
    figure.savefig(picture)
