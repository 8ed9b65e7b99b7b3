"""Two copies of a segment that a penalty keeps alike (LoCo, section 5.5, "soft sharing")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from framework.data.batch import Batch
from framework.local.blocks import own_copy
from framework.local.units import ReadingHead, Task
from framework.network import Segment


class SoftSharedHead(ReadingHead):
    """A head behind an own copy of a segment.

    The penalty is ``coefficient * sum (w_copy - w_segment)^2``; its gradient goes to both. The copy starts equal
    to the segment.

    Args:
        task: has the segment.
        segment: its number.
        head: reads the copy's output.
        coefficient: of the penalty.
        norm: whether it holds BatchNorm's weights, or whatever has at most one dimension, too.
    """

    def __init__(
        self, task: Task, segment: int, head: nn.Module, coefficient: float, norm: bool = True
    ) -> None:
        super().__init__()
        self.norm = norm
        self.copy = own_copy(task.segments[segment])
        self.head, self.coefficient = head, coefficient
        self.reads = (segment,)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """Scalar loss on the output ``x`` (N, C, H, W) of the segment below the copied one."""
        return self.head(self.copy(x), batch)

    @property
    def contrasts(self) -> bool:
        """As the inner head."""
        return getattr(self.head, "contrasts", False)

    def embed(self, x: Tensor) -> Tensor:
        """As the inner head's."""
        return self.head.embed(self.copy(x))  # type: ignore[operator]

    def score(self, embeddings: Tensor, batch: Batch) -> Tensor:
        """As the inner head's."""
        return self.head.score(embeddings, batch)  # type: ignore[operator]

    def penalty(self, segments: Sequence[Segment]) -> Tensor:
        """Scalar."""
        pairs = zip(self.copy.parameters(), segments[self.reads[0]].parameters(), strict=True)
        kept = [(a, b) for a, b in pairs if self.norm or a.ndim > 1]
        return self.coefficient * torch.stack([(a - b).square().sum() for a, b in kept]).sum()
