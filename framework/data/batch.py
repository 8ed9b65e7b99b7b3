"""What goes into a network."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """A micro-batch of one rank.

    Attributes:
        images: (V*B, 3, H, W), normalized; the V views stacked view-major.
        labels: (B,) int64; of mixed images (B, classes) float32, each row adding up to 1; or ``None``.
        views: V.
        last: whether an optimizer step follows; with accumulation only after the last micro-batch.
        teacher: (V*B, D) or (B, D), what the teacher embeds for the head that is called; without a graph.
        visible: (V*B, K) int64, numbers of the patches that the segments see, ascending; ``None`` for all.
    """

    images: Tensor
    labels: Tensor | None = None
    views: int = 1
    last: bool = True
    teacher: Tensor | None = None
    visible: Tensor | None = None
