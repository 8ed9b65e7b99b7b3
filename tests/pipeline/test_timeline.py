"""The trace is one that viewers can read, and shows the time that was spent."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest
from test_schedule import named_plan, unit_costs

from framework.execution.program import segment_programs
from framework.pipeline.scheduling.placement import balanced
from framework.pipeline.scheduling.schedule import Layout
from framework.pipeline.scheduling.simulation import costs_of, simulate
from framework.pipeline.timeline import WAITING, idle_fraction, kind_of, window, write_trace


def test_a_trace_is_in_chromes_format_and_complete(tmp_path: Path) -> None:
    """Complete events ("X") in microseconds by process and thread, and thread names as metadata ("M")."""
    stages, steps = 3, 4
    layout = Layout(segment_programs(named_plan("loco", stages)), balanced([1.0] * stages, stages), 2)
    ran = simulate(layout, costs_of(layout, unit_costs(stages)), steps)
    write_trace(ran.events, tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    rows, names = defaultdict(list), {}
    for entry in trace["traceEvents"]:
        assert (
            isinstance(entry["name"], str) and isinstance(entry["pid"], int) and isinstance(entry["tid"], int)
        )
        if entry["ph"] == "M":
            assert entry["name"] == "thread_name"
            names[entry["tid"]] = entry["args"]["name"]
        else:
            assert entry["ph"] == "X" and entry["ts"] >= 0 and entry["dur"] >= 0
            rows[entry["tid"]].append(entry)
    assert names == {0: "stage 0", 1: "stage 1", 2: "stage 2"} and rows.keys() == names.keys()
    for stage, entries in rows.items():
        events = ran.events[stage]
        assert [entry["name"] for entry in entries] == [type(event.instruction).__name__ for event in events]
        for one, other in pairwise(entries):
            assert one["ts"] + one["dur"] <= other["ts"] + 1e-3, "a stage does one thing at a time"
        assert sum(e["dur"] for e in entries) == pytest.approx(1e6 * sum(e.end - e.start for e in events))
        assert entries[-1]["ts"] + entries[-1]["dur"] == pytest.approx(1e6 * events[-1].end)
        assert sum(entry["name"] == "OptimizerStep" for entry in entries) == steps


def test_idle_is_what_is_not_work() -> None:
    """One window over two stages, one micro-batch: they take turns, by hand 1 + 2 and 1 + 0.1 + 2 of 6.1."""
    layout = Layout(segment_programs(named_plan("loco", 2)), balanced([1.0] * 2, 2), 1)
    ran = simulate(layout, costs_of(layout, unit_costs(2)), 6)
    for events, work in zip(ran.events, (3.0, 3.1), strict=True):
        begin, end, steps = window(events, skip=2)
        assert steps == 4 and end - begin == pytest.approx(4 * 6.1)
        assert idle_fraction(events, skip=2) == pytest.approx(1 - work / 6.1)
        assert all(kind_of(event.instruction) != WAITING for event in events if event.end > event.start)
