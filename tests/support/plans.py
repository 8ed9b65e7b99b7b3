"""Plans without heads, and costs, for schedules that are simulated."""

from __future__ import annotations

from framework.local import LocalUnit, Plan
from framework.local.head import Head
from framework.local.units import Window, sliding_windows
from framework.pipeline.scheduling.placement import Costs


def plan(segments: int, windows: list[Window]) -> Plan:
    units = (LocalUnit(f"u{i}", first, last, Head()) for i, (first, last) in enumerate(windows))
    return Plan(tuple(units), segments)


def named_plan(name: str, segments: int) -> Plan:
    windows = {
        "bp": [(0, segments - 1)],
        "gim": sliding_windows(segments, 1),
        "loco": sliding_windows(segments, min(2, segments)),
        "mlaan-3": sliding_windows(segments, 1) + sliding_windows(segments, min(3, segments)),
    }
    return plan(segments, windows[name])


def unit_costs(segments: int, head: float = 0.1, calls: int | None = None) -> Costs:
    """Passes cost 1, a weight pass of many layers 2."""
    ones = (1.0,) * segments
    return Costs(ones, ones, (2.0,) * segments, (head,) * (segments if calls is None else calls))
