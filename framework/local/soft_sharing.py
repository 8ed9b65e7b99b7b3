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
        self._segment, self._coefficient = segment, coefficient
        self._kept = [norm or weight.ndim > 1 for weight in self.copy.parameters()]
        self.reads = tuple(dict.fromkeys((segment, *head.reads)))
        self.penalizes = True
        self.reads_after = bool(head.reads and head.reads_after)
        self.elementwise = not head.reads or head.elementwise

    def penalty(self, segments: Sequence[Segment]) -> Tensor:
        """Scalar."""
        segment = segments[self._segment]
        original = part(segment.backbone, segment.steps)
        pairs = zip(self.copy.parameters(), original.parameters(), strict=True)
        distances = [(a - b).square().sum() for (a, b), kept in zip(pairs, self._kept, strict=True) if kept]
        own = self._coefficient * torch.stack(distances).sum()
        inner = super().penalty(segments)
        return own if inner is None else own + inner
