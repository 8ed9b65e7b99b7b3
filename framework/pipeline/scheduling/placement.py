"""Which pipeline stage owns which segments, and what the work on a segment costs."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from framework.execution.program import InputGradient, SegmentProgram
from framework.runtime.errors import UserError


@dataclass(frozen=True)
class Placement:
    """Stage k owns the segments ``bounds[k]`` to ``bounds[k + 1] - 1`` and the heads on them."""

    bounds: tuple[int, ...]

    @property
    def stages(self) -> int:
        """How many there are."""
        return len(self.bounds) - 1

    def span(self, stage: int) -> range:
        """The segments of a stage."""
        return range(self.bounds[stage], self.bounds[stage + 1])

    def stage_of(self, segment: int) -> int:
        """The stage that owns a segment."""
        return bisect_right(self.bounds, segment) - 1


@dataclass(frozen=True)
class Costs:
    """What the parts of a micro-batch's work cost, in seconds, FLOPs or any other unit.

    Attributes:
        forward: of each segment.
        input_gradients: of each segment, one pass.
        weight_gradients: of each segment, whether or not the pass also gives its input gradient: the input gradients
            between the layers of a segment are needed for either.
        heads: of each head call, forward and backward.
    """

    forward: tuple[float, ...]
    input_gradients: tuple[float, ...]
    weight_gradients: tuple[float, ...]
    heads: tuple[float, ...]

    def walk(self, program: SegmentProgram, span: range) -> float:
        """The backward work in some segments that follows the forward of one."""
        return sum(
            (self.input_gradients if isinstance(step, InputGradient) else self.weight_gradients)[step.segment]
            for step in program.walk
            if step.segment in span
        )

    def per_segment(self, programs: Sequence[SegmentProgram]) -> list[float]:
        """All work of a micro-batch, by the segment that it is done on."""
        return [
            self.forward[s]
            + sum(self.heads[call.number] for call in program.heads)
            + sum(self.walk(other, range(s, s + 1)) for other in programs)
            for s, program in enumerate(programs)
        ]


def balanced(costs: Sequence[float], stages: int) -> Placement:
    """Split segments into consecutive parts so that the largest cost of a part is as small as possible.

    Args:
        costs: of the segments.
        stages: number of parts.

    Raises:
        UserError: more stages than segments.
    """
    n = len(costs)
    if stages > n:
        raise UserError(
            f"pipeline.stages={stages}: the network has {n} segments, so at most {n} stages are possible "
            "(network.cut makes more segments)"
        )
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    # best[k][i]: largest cost of k + 1 parts of the first i segments, and where the last part begins.
    best: list[list[tuple[float, int]]] = [[(total[i], 0) for i in range(n + 1)]]
    for k in range(1, stages):
        row = [(float("inf"), 0)] * (k + 1)
        for i in range(k + 1, n + 1):
            row.append(min((max(best[-1][j][0], total[i] - total[j]), j) for j in range(k, i)))
        best.append(row)
    bounds = [n]
    for k in range(stages - 1, -1, -1):
        bounds.append(best[k][bounds[-1]][1])
    return Placement(tuple(reversed(bounds)))


def listed(counts: Sequence[int], segments: int, stages: int) -> Placement:
    """The placement with these numbers of segments on the stages.

    Raises:
        UserError: the counts are not one a stage, or do not add up to the network's segments.
    """
    if len(counts) != stages or min(counts) < 1 or sum(counts) != segments:
        raise UserError(
            f"pipeline.balance={list(counts)}: must be the numbers of segments on each of pipeline.stages={stages} "
            f"stages, at least 1 each and {segments} in all"
        )
    bounds = [0]
    for count in counts:
        bounds.append(bounds[-1] + count)
    assert all(a < b for a, b in pairwise(bounds))
    return Placement(tuple(bounds))
