"""What happens after each segment's forward, derived from the plan alone.

The lower edge of a window names the *route* of its gradient: cotangents on one route add up, and each
route is walked down once, when the last of its windows has closed. A segment's graph is released when
the last window that contains it has closed.
"""

from __future__ import annotations

from dataclasses import dataclass

from framework.local.units import LocalUnit, Plan


@dataclass(frozen=True)
class GradientRoute:
    """Where a cotangent is bound for: down to segment ``first``, changing the weights in ``learns``."""

    first: int
    learns: frozenset[int]


@dataclass(frozen=True, eq=False)
class HeadCall:
    """One run of a head, on behalf of all units that share it here; ``number`` counts all calls of the plan."""

    number: int
    units: tuple[int, ...]
    routes: tuple[GradientRoute, ...]


@dataclass(frozen=True)
class InputGradient:
    """Input-gradient pass of one route through a segment, whose graph stays."""

    segment: int
    route: GradientRoute


@dataclass(frozen=True)
class WeightGradient:
    """Weight-gradient pass of a segment, after which its graph is freed.

    Where a single cotangent is left, the input gradient of its ``route`` comes with it.
    """

    segment: int
    route: GradientRoute | None = None


@dataclass(frozen=True, eq=False)
class SegmentProgram:
    """What follows the forward of one segment.

    Attributes:
        heads: heads to run on its output.
        walk: then, from the segment downwards, the backward work that waits for no later window.
    """

    heads: tuple[HeadCall, ...]
    walk: tuple[InputGradient | WeightGradient, ...]

    def crossing(self, segment: int) -> tuple[GradientRoute, ...]:
        """Routes whose cotangents the walk takes from ``segment`` down to the one below it, in order."""
        return tuple(step.route for step in self.walk if step.segment == segment and step.route is not None)


def moments(plan: Plan) -> tuple[SegmentProgram, ...]:
    """One moment a segment, in forward order."""
    routes = [GradientRoute(unit.first, _learns(plan, unit)) for unit in plan.units]
    closes = {r: max(u.last for u, q in zip(plan.units, routes, strict=True) if q == r) for r in routes}
    released = [max(u.last for u in plan.units if u.first <= s <= u.last) for s in range(plan.segments)]
    traffic = _Traffic(plan.segments)
    found: list[SegmentProgram] = []
    for segment in range(plan.segments):
        calls = _head_calls(plan, routes, segment, sum(len(moment.heads) for moment in found))
        for route in (route for call in calls for route in call.routes):
            traffic.arrive(segment, route)
        walk = []
        for s in range(segment, -1, -1):
            due = [route for route in traffic.in_flight[s] if closes[route] == segment]
            walk += traffic.cross(s, due, released[s] == segment)
        found.append(SegmentProgram(calls, tuple(walk)))
    return tuple(found)


class _Traffic:
    """Cotangents on their way while the moments are found."""

    def __init__(self, segments: int) -> None:
        self.in_flight: list[dict[GradientRoute, None]] = [{} for _ in range(segments)]
        self.accumulated = [False] * segments

    def arrive(self, segment: int, route: GradientRoute) -> None:
        if route.first < segment:
            self.in_flight[segment][route] = None
        elif segment in route.learns:
            self.accumulated[segment] = True

    def cross(
        self, segment: int, due: list[GradientRoute], released: bool
    ) -> list[InputGradient | WeightGradient]:
        alone = released and len(due) == 1 and not self.accumulated[segment] and segment in due[0].learns
        for route in due:
            del self.in_flight[segment][route]
            self.arrive(segment - 1, route)
            self.accumulated[segment] |= segment in route.learns
        if alone:
            return [WeightGradient(segment, due[0])]
        assert not released or (self.accumulated[segment] and not self.in_flight[segment])
        return [InputGradient(segment, route) for route in due] + (
            [WeightGradient(segment)] if released else []
        )


def _learns(plan: Plan, unit: LocalUnit) -> frozenset[int]:
    """Units that train their whole window share a route whatever their length, so name it alike."""
    return frozenset(range(unit.first, plan.segments)) if unit.trains is None else unit.trains


def _head_calls(plan: Plan, routes: list[GradientRoute], segment: int, number: int) -> tuple[HeadCall, ...]:
    here = [i for i, unit in enumerate(plan.units) if unit.last == segment]
    heads = dict.fromkeys(plan.units[i].head for i in here)
    sharing = [tuple(i for i in here if plan.units[i].head is head) for head in heads]
    return tuple(
        HeadCall(number + n, units, tuple(routes[i] for i in units)) for n, units in enumerate(sharing)
    )
