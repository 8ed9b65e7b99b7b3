"""What goes into a network and what comes out."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """A micro-batch of one rank.

    Attributes:
        images: (V*B, 3, H, W), normalized; the V views stacked view-major.
        labels: (B,) int64, or ``None``.
        views: V.
        last: whether an optimizer step follows; with accumulation only after the last micro-batch.
    """

    images: Tensor
    labels: Tensor | None = None
    views: int = 1
    last: bool = True


class StepOutput(NamedTuple):
    """The result of a forward; a named tuple, so that FSDP2 finds the loss in it.

    Attributes:
        loss: weighted sum of the unit losses; its ``backward()`` hands over the finished gradients.
        unit_losses: (U,) detached, unweighted, in the order of the plan's units.
        overflow: bool scalar, the same on every rank: skip this step; ``None`` where nobody looks.
    """

    loss: Tensor
    unit_losses: Tensor
    overflow: Tensor | None = None
