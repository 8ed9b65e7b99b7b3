"""What a training step does, worked out once from the plan and fixed from then on.

The lower edge of a window names the *route* of its gradient: cotangents on one route add up, and a route is followed
down once, when the last of its windows has ended. A segment's graph is freed when the last window that contains the
segment has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from framework.execution.precision import autocast, autocast_type
from framework.local.head import Head
from framework.local.units import LocalUnit, Plan
from framework.network import Segment
from framework.runtime.errors import UserError

RECOMPUTE = ("none", "segment", "block")


@dataclass(frozen=True)
class GradientRoute:
    """Where a cotangent goes: down to segment ``first``, and into the weights of the segments in ``learns``."""

    first: int
    learns: frozenset[int]


@dataclass(frozen=True, eq=False)
class HeadCall:
    """One run of a head, for all units that share it on this segment.

    Attributes:
        number: counts the calls of the plan.
        head: what runs.
        units: numbers of the units.
        routes: where the gradient of each goes.
    """

    number: int
    head: Head
    units: tuple[int, ...]
    routes: tuple[GradientRoute, ...]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Of the head, as they are now."""
        return [p for p in self.head.parameters() if p.requires_grad]


@dataclass(frozen=True)
class InputGradient:
    """Input-gradient pass of one route through a segment, whose graph stays."""

    segment: int
    route: GradientRoute


@dataclass(frozen=True)
class WeightGradient:
    """Weight-gradient pass of a segment, after which its graph is freed.

    Where only one cotangent is left, the pass gives the input gradient of its ``route`` too.
    """

    segment: int
    route: GradientRoute | None = None


@dataclass(frozen=True, eq=False)
class SegmentProgram:
    """What follows the forward of one segment.

    Attributes:
        heads: heads to run on its output.
        walk: then, from this segment downwards, the passes that need no later window.
    """

    heads: tuple[HeadCall, ...]
    walk: tuple[InputGradient | WeightGradient, ...]

    @property
    def freed(self) -> tuple[int, ...]:
        """Segments whose weight gradients ``walk`` takes."""
        return tuple(step.segment for step in self.walk if isinstance(step, WeightGradient))

    def crossing(self, segment: int) -> tuple[GradientRoute, ...]:
        """Routes whose cotangents ``walk`` takes from ``segment`` down to the one below it, in order."""
        return tuple(step.route for step in self.walk if step.segment == segment and step.route is not None)


@dataclass(frozen=True)
class Recomputation:
    """Activations that are not kept: for some time a segment has no graph, and is then run again.

    Attributes:
        segments: those that are run again.
        bare: those of them whose forward pass leaves no graph.
        dropped: the input-gradient passes behind which the others' graphs are dropped.
        pieces: of those that are run again piece by piece, in every pass.
    """

    segments: frozenset[int] = frozenset()
    bare: frozenset[int] = frozenset()
    dropped: frozenset[InputGradient] = frozenset()
    pieces: Mapping[int, tuple[Segment, ...]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Program:
    """All that a training step needs to know.

    Attributes:
        plan: the local units.
        segments: of the network.
        runners: what runs the segments in a training step; the segments themselves, or compiled forms.
        segment_programs: what follows the forward of each.
        low_precision: type that ``torch.autocast`` computes in; ``None`` leaves tensors as they are.
        recomputation: which segments are run again, and when.
    """

    plan: Plan
    segments: tuple[Segment, ...]
    runners: tuple[Callable[[Tensor], Tensor], ...]
    segment_programs: tuple[SegmentProgram, ...]
    low_precision: torch.dtype | None = None
    recomputation: Recomputation = Recomputation()

    @classmethod
    def of(
        cls, plan: Plan, segments: Sequence[Segment], precision: str = "fp32", recompute: str = "none"
    ) -> Program:
        """The program of a plan over these segments.

        Raises:
            UserError: there is no such precision, or no such ``recompute``.
        """
        whole, programs = tuple(segments), segment_programs(plan)
        again = recomputation(plan, programs, whole, recompute)
        return cls(plan, whole, whole, programs, autocast_type(precision), again)

    @property
    def top_first(self) -> bool:
        """Whether heads and gradients wait for the forward pass of all segments."""
        return self.plan.execution.kind == "top first"

    @cached_property
    def calls(self) -> tuple[HeadCall, ...]:
        """All head calls, by number."""
        return tuple(call for program in self.segment_programs for call in program.heads)

    def covering(self, segment: int) -> frozenset[HeadCall]:
        """Head calls with a segment in one of their windows."""
        units = self.plan.units
        return frozenset(
            call for call in self.calls if any(units[i].first <= segment <= units[i].last for i in call.units)
        )

    def trained(self, s: int) -> list[nn.Parameter]:
        """Those of segment ``s``, as they are now."""
        return list(self.segments[s].parameters())

    def weight(self, call: HeadCall) -> float:
        """The largest weight of the units that share a head call."""
        return max(self.plan.units[i].weight for i in call.units)

    def by_unit(self, by_call: Tensor) -> Tensor:
        """Values of the head calls (calls,) as those of the units that share them (U,)."""
        calls = {unit: call.number for call in self.calls for unit in call.units}
        values = by_call.unbind()
        return torch.stack([values[calls[unit]] for unit in range(len(calls))])

    def autocast(self, x: Tensor) -> AbstractContextManager[object]:
        """The precision in which segments and heads run on the device of ``x``."""
        return autocast(x.device.type, self.low_precision)


def segment_programs(plan: Plan) -> tuple[SegmentProgram, ...]:
    """One for each segment, in forward order."""
    routes = [GradientRoute(unit.first, _learns(plan, unit)) for unit in plan.units]
    ends = {r: max(u.last for u, q in zip(plan.units, routes, strict=True) if q == r) for r in routes}
    freed = [max(u.last for u in plan.units if u.first <= s <= u.last) for s in range(plan.segments)]
    cotangents = _Cotangents(plan.segments)
    programs: list[SegmentProgram] = []
    for segment in range(plan.segments):
        calls = _head_calls(plan, routes, segment, sum(len(program.heads) for program in programs))
        for route in (route for call in calls for route in call.routes):
            cotangents.add(segment, route)
        walk = []
        for s in range(segment, -1, -1):
            due = [route for route in cotangents.in_flight[s] if ends[route] == segment]
            walk += cotangents.passes(s, due, freed[s] == segment)
        programs.append(SegmentProgram(calls, tuple(walk)))
    return tuple(programs)


def recomputation(
    plan: Plan, programs: Sequence[SegmentProgram], segments: Sequence[Segment], kind: str
) -> Recomputation:
    """What is run again, and when.

    Args:
        plan: the local units.
        programs: of the segments.
        segments: of the network.
        kind: "none". "segment": a segment is without a graph for the longest time, in segments that run meanwhile,
            between its forward pass and the passes through it, or between two of those (of equally long ones the
            last). One whose passes all follow its own forward keeps its graph: nothing runs in between. "block": a
            segment of several blocks keeps the inputs of its blocks only, and every pass runs each of them again.

    Raises:
        UserError: there is no such kind.
    """
    if kind not in RECOMPUTE:
        raise UserError(f"execution.recompute={kind}: must be one of {', '.join(RECOMPUTE)}")
    if kind == "none":
        return Recomputation()
    pieces = {s: own for s, x in enumerate(segments) if kind == "block" and len(own := x.pieces()) > 1}
    bare, dropped = set(pieces), set()
    for s in (s for s in range(plan.segments) if s not in pieces):
        longest, before = _longest_gap(plan, programs, s)
        if before is not None:
            dropped.add(before)
        elif longest:
            bare.add(s)
    again = bare | {work.segment for work in dropped}
    return Recomputation(frozenset(again), frozenset(bare), frozenset(dropped), pieces)


def _longest_gap(plan: Plan, programs: Sequence[SegmentProgram], s: int) -> tuple[int, InputGradient | None]:
    """Turns between two uses of a segment's graph, and the pass before them; ``None`` for the forward pass."""
    top, top_first = plan.segments - 1, plan.execution.kind == "top first"
    time, before = s, None
    gaps: list[tuple[int, InputGradient | None]] = []
    for after in reversed(range(s, top + 1)) if top_first else range(s, top + 1):
        passes = [work for work in programs[after].walk if work.segment == s]
        if passes:
            turn = 2 * top - after if top_first else after
            gaps.append((turn - time, before))
            time = turn
            before = next((work for work in reversed(passes) if isinstance(work, InputGradient)), None)
    return max(reversed(gaps), key=lambda gap: gap[0])


class _Cotangents:
    """Which cotangents exist at each segment's output, while the programs are worked out."""

    def __init__(self, segments: int) -> None:
        self.in_flight: list[dict[GradientRoute, None]] = [{} for _ in range(segments)]
        self.accumulated = [False] * segments

    def add(self, segment: int, route: GradientRoute) -> None:
        if route.first < segment:
            self.in_flight[segment][route] = None
        elif segment in route.learns:
            self.accumulated[segment] = True

    def passes(
        self, segment: int, due: list[GradientRoute], freed: bool
    ) -> list[InputGradient | WeightGradient]:
        """The passes through a segment for the routes that are due, and its last one if it is freed."""
        alone = freed and len(due) == 1 and not self.accumulated[segment] and segment in due[0].learns
        for route in due:
            del self.in_flight[segment][route]
            self.add(segment - 1, route)
            self.accumulated[segment] |= segment in route.learns
        if alone:
            return [WeightGradient(segment, due[0])]
        assert not freed or (self.accumulated[segment] and not self.in_flight[segment])
        return [InputGradient(segment, route) for route in due] + ([WeightGradient(segment)] if freed else [])


def _learns(plan: Plan, unit: LocalUnit) -> frozenset[int]:
    """The same for all units with one lower edge that train their whole windows, so that they share a route."""
    return frozenset(range(unit.first, plan.segments)) if unit.trains is None else unit.trains


def _head_calls(plan: Plan, routes: list[GradientRoute], segment: int, number: int) -> tuple[HeadCall, ...]:
    here = [i for i, unit in enumerate(plan.units) if unit.last == segment]
    heads = dict.fromkeys(plan.units[i].head for i in here)
    sharing = [(head, tuple(i for i in here if plan.units[i].head is head)) for head in heads]
    return tuple(
        HeadCall(number + n, head, units, tuple(routes[i] for i in units))
        for n, (head, units) in enumerate(sharing)
    )
