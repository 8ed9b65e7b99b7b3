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
    """One run of a head, on behalf of all units that share it here."""

    units: tuple[int, ...]
    routes: tuple[Route, ...]


@dataclass(frozen=True, eq=False)
class Moment:
    """What follows the forward of one segment.

    Attributes:
        heads: heads to run on its output.
        walks: routes that no later window joins; their cotangents go down to ``first`` now.
        releases: segments, highest first, whose weight gradient is due and whose graph is freed.
    """

    heads: tuple[HeadCall, ...]
    walks: frozenset[Route]
    releases: tuple[int, ...]


def moments(plan: Plan) -> tuple[Moment, ...]:
    """One moment a segment, in forward order."""
    routes = [Route(unit.first, _learns(plan, unit)) for unit in plan.units]
    closes = {r: max(u.last for u, q in zip(plan.units, routes, strict=True) if q == r) for r in routes}
    released = [max(u.last for u in plan.units if u.first <= s <= u.last) for s in range(plan.segments)]
    return tuple(
        Moment(
            heads=_head_calls(plan, routes, segment),
            walks=frozenset(r for r, last in closes.items() if last == segment),
            releases=tuple(s for s in reversed(range(segment + 1)) if released[s] == segment),
        )
        for segment in range(plan.segments)
    )


def _learns(plan: Plan, unit: LocalUnit) -> frozenset[int]:
    """Units that train their whole window share a route whatever their length, so name it alike."""
    return frozenset(range(unit.first, plan.segments)) if unit.trains is None else unit.trains


def _head_calls(plan: Plan, routes: list[Route], segment: int) -> tuple[HeadCall, ...]:
    here = [i for i, unit in enumerate(plan.units) if unit.last == segment]
    heads = dict.fromkeys(plan.units[i].head for i in here)
    sharing = [tuple(i for i in here if plan.units[i].head is head) for head in heads]
    return tuple(HeadCall(units, tuple(routes[i] for i in units)) for units in sharing)
