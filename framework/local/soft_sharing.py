"""Two copies of a segment that a penalty keeps alike (LoCo, section 5.5, "soft sharing")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from framework.local.copies import own_copy
from framework.local.head import Head, WrappingHead
from framework.local.units import NetworkInfo
from framework.network import Segment
from framework.network.parts import part


class SoftSharedHead(WrappingHead):
    """A head behind an own copy of a segment.

    The penalty is ``coefficient * sum (w_copy - w_segment)^2``; its gradient goes to both. The copy starts equal
    to the segment.

    Args:
        network: has the segment.
        segment: its number.
        head: reads the copy's output.
        coefficient: of the penalty.
        norm: whether the sum includes weights of at most one dimension, such as BatchNorm's.
    """

    copy: nn.Sequential

    def __init__(
        self, network: NetworkInfo, segment: int, head: Head, coefficient: float, norm: bool = True
    ) -> None:
        copied = network.segments[segment]
        super().__init__("copy", own_copy(copied), head, copied.to_map)
        self._segment, self._coefficient, self._norm = segment, coefficient, norm
        self.reads = tuple(dict.fromkeys((segment, *head.reads)))
        self.penalizes = True
        self.reads_after = bool(head.reads and head.reads_after)

    def penalty(self, segments: Sequence[Segment]) -> Tensor:
        """Scalar."""
        segment = segments[self._segment]
        original = part(segment.backbone, segment.steps)
        pairs = zip(self.copy.parameters(), original.parameters(), strict=True)
        kept = [(a, b) for a, b in pairs if self._norm or a.ndim > 1]
        own = self._coefficient * torch.stack([(a - b).square().sum() for a, b in kept]).sum()
        inner = super().penalty(segments)
        return own if inner is None else own + inner
