"""The losses of a batch without gradients: every segment once, heads as in a training step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import Tensor

from framework.data.batch import Batch
from framework.execution.program import HeadCall, Program
from framework.execution.teacher import TeacherPass
from framework.execution.uses import Use

Lent = Callable[[Use], AbstractContextManager[None]]


def evaluated_losses(
    program: Program, x: Tensor, batch: Batch, teacher: TeacherPass | None, lent: Lent
) -> dict[int, Tensor]:
    """By number of the unit, unweighted.

    Args:
        program: of the network.
        x: input of the first segment.
        batch: what the heads see besides.
        teacher: runs beside the segments.
        lent: inside it the weights of a use are there.
    """
    losses: dict[int, Tensor] = {}
    waiting: list[tuple[int, HeadCall, Tensor, Tensor | None]] = []
    with program.autocast(x):
        for s, (segment, own) in enumerate(zip(program.segments, program.segment_programs, strict=True)):
            with lent(Use("forward", s)):
                x = segment(x)
                keys = teacher.forward(s) if teacher is not None else {}
            waiting += [(s, call, call.head.seen(segment, x), keys.get(call.head)) for call in own.heads]
            while waiting and (s == program.plan.segments - 1 or not program.top_first):
                on, call, features, key = waiting.pop()
                with lent(Use("heads", on)):
                    loss = call.head(features, batch._replace(teacher=key))
                losses.update(dict.fromkeys(call.units, loss))
    return losses
