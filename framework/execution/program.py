"""What happens after each segment's forward, derived from the plan alone.

The lower edge of a window names the *route* of its gradient: cotangents on one route add up, and each
route is walked down once, when the last of its windows has closed. A segment's graph is released when
the last window that contains it has closed.
"""

from __future__ import annotations

from dataclasses import dataclass

from framework.local.units import LocalUnit, Plan


@dataclass(frozen=True)
class Route:
    """Where a cotangent is bound for: down to segment ``first``, changing the weights in ``learns``."""

    first: int
    learns: frozenset[int]


@dataclass(frozen=True, eq=False)
class HeadCall:
    """One run of a head, on behalf of all units that share it here; ``number`` counts all calls of the plan."""

    number: int
    units: tuple[int, ...]
    routes: tuple[Route, ...]


@dataclass(frozen=True)
class Pass:
    """Input-gradient pass of one route through a segment, whose graph stays."""

    segment: int
    route: Route


@dataclass(frozen=True)
class Release:
    """Weight-gradient pass of a segment, after which its graph is freed.

    Where a single cotangent is left, the input gradient of its ``route`` comes with it.
    """

    segment: int
    route: Route | None = None


@dataclass(frozen=True, eq=False)
class Moment:
    """What follows the forward of one segment.

    Attributes:
        heads: heads to run on its output.
        walk: then, from the segment downwards, the backward work that waits for no later window.
    """

    heads: tuple[HeadCall, ...]
    walk: tuple[Pass | Release, ...]

    def crossing(self, segment: int) -> tuple[Route, ...]:
        """Routes whose cotangents the walk takes from ``segment`` down to the one below it, in order."""
        return tuple(step.route for step in self.walk if step.segment == segment and step.route is not None)


def moments(plan: Plan) -> tuple[Moment, ...]:
    """One moment a segment, in forward order."""
    routes = [Route(unit.first, _learns(plan, unit)) for unit in plan.units]
    closes = {r: max(u.last for u, q in zip(plan.units, routes, strict=True) if q == r) for r in routes}
    released = [max(u.last for u in plan.units if u.first <= s <= u.last) for s in range(plan.segments)]
    traffic = _Traffic(plan.segments)
    found: list[Moment] = []
    for segment in range(plan.segments):
        calls = _head_calls(plan, routes, segment, sum(len(moment.heads) for moment in found))
        for route in (route for call in calls for route in call.routes):
            traffic.arrive(segment, route)
        walk = []
        for s in range(segment, -1, -1):
            due = [route for route in traffic.travelling[s] if closes[route] == segment]
            walk += traffic.cross(s, due, released[s] == segment)
        found.append(Moment(calls, tuple(walk)))
    return tuple(found)


class _Traffic:
    """Cotangents on their way while the moments are found."""

    def __init__(self, segments: int) -> None:
        self.travelling: list[dict[Route, None]] = [{} for _ in range(segments)]
        self.arrived = [False] * segments

    def arrive(self, segment: int, route: Route) -> None:
        if route.first < segment:
            self.travelling[segment][route] = None
        elif segment in route.learns:
            self.arrived[segment] = True

    def cross(self, segment: int, due: list[Route], released: bool) -> list[Pass | Release]:
        alone = released and len(due) == 1 and not self.arrived[segment] and segment in due[0].learns
        for route in due:
            del self.travelling[segment][route]
            self.arrive(segment - 1, route)
            self.arrived[segment] |= segment in route.learns
        if alone:
            return [Release(segment, due[0])]
        assert not released or (self.arrived[segment] and not self.travelling[segment])
        return [Pass(segment, route) for route in due] + ([Release(segment)] if released else [])


def _learns(plan: Plan, unit: LocalUnit) -> frozenset[int]:
    """Units that train their whole window share a route whatever their length, so name it alike."""
    return frozenset(range(unit.first, plan.segments)) if unit.trains is None else unit.trains


def _head_calls(plan: Plan, routes: list[Route], segment: int, number: int) -> tuple[HeadCall, ...]:
    here = [i for i, unit in enumerate(plan.units) if unit.last == segment]
    heads = dict.fromkeys(plan.units[i].head for i in here)
    sharing = [tuple(i for i in here if plan.units[i].head is head) for head in heads]
    return tuple(
        HeadCall(number + n, units, tuple(routes[i] for i in units)) for n, units in enumerate(sharing)
    )
