"""Which checkpoints stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Keep:
    """A policy; what any of its parts wants stays.

    Attributes:
        last: how many of the newest.
        every_steps: those at multiples of so many steps.
        best: the one with the lowest loss; of equals the newest.
    """

    last: int = 2
    every_steps: int | None = None
    best: bool = False


def superfluous(losses: Mapping[int, float | None], keep: Keep) -> list[int]:
    """Steps of the checkpoints that may go.

    Args:
        losses: mean loss of every checkpoint by step; ``None`` where it is not known.
        keep: the policy.
    """
    steps = sorted(losses)
    wanted = set(steps[-keep.last :])
    if keep.every_steps is not None:
        wanted |= {step for step in steps if step % keep.every_steps == 0}
    known = [(loss, -step) for step, loss in losses.items() if loss is not None]
    if keep.best and known:
        wanted.add(-min(known)[1])
    return [step for step in steps if step not in wanted]
