"""When a micro-batch uses which weights; worked out once, from the program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from framework.execution.program import Program
from framework.execution.teacher import Teacher
from framework.local.copies import followers
from framework.network import Segment

# Turns of the loop over segments for which sharded weights wait for their next use. Beyond that, as in
# backpropagation or in windows of more than three segments, they are released and gathered again: memory is dearer than
# traffic here.
STAYS = 2


class Use(NamedTuple):
    """Something that a micro-batch does with weights.

    Attributes:
        what: "frozen": the forward of a frozen segment. "forward": that of a segment, and of its teacher. "heads": the
            heads on a segment. "backward": one pass of gradients through a segment.
        segment: its number, counted among the frozen ones or the others.
    """

    what: Literal["frozen", "forward", "heads", "backward"]
    segment: int


@dataclass(frozen=True, eq=False)
class Uses:
    """Of a network.

    Attributes:
        turns: what a micro-batch does above the frozen segments, in order; what stands together is done in one turn of
            the loop over segments.
        weights: what is used: parameters, trained or not, and averages of weights.
    """

    turns: Sequence[Sequence[Use]]
    weights: Mapping[Use, Sequence[Tensor]]

    @classmethod
    def of(cls, program: Program, frozen: Sequence[Segment], teacher: Teacher | None) -> Uses:
        """Those of a program, of the frozen segments below it and the teacher beside it."""
        weights: dict[Use, list[Tensor]] = {}
        for i, segment in enumerate(frozen):
            weights[Use("frozen", i)] = [*segment.weights()]
        for s, (segment, own) in enumerate(zip(program.segments, program.segment_programs, strict=True)):
            weights[Use("backward", s)] = [*segment.weights()]
            averages = teacher.averages(s) if teacher is not None else []
            weights[Use("forward", s)] = [*segment.weights(), *averages]
            heads = [call.head for call in own.heads]
            weights[Use("heads", s)] = [
                tensor for head in heads for tensor in (*head.parameters(), *followers(head))
            ]
        return cls(_turns(program), weights)


def _turns(program: Program) -> list[list[Use]]:
    segments = range(len(program.segments))
    forward = [[Use("forward", s)] for s in segments]
    after = [
        [Use("heads", s), *(Use("backward", step.segment) for step in own.walk)]
        for s, own in enumerate(program.segment_programs)
    ]
    if program.top_first:
        return forward + after[::-1]
    return [[*first, *then] for first, then in zip(forward, after, strict=True)]
