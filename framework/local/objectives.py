"""Objectives: what a head's output is scored by."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework import distributed
from framework.batch import Batch
from framework.errors import UserError


class CrossEntropy(nn.Module):
    """Cross entropy of logits (B, classes) against ``batch.labels`` (B,)."""

    def forward(self, logits: Tensor, batch: Batch) -> Tensor:
        """Scalar loss, in float32 or better."""
        if batch.labels is None:
            raise UserError("a supervised head needs labels, and the batch has none")
        return F.cross_entropy(_at_least_float32(logits), batch.labels)


class InfoNCE(nn.Module):
    """NT-Xent (SimCLR Eq. 1; LoCo Eq. 1 for one query) with the negatives of all ranks.

    Every view of every image is an anchor, its image's other view the positive, all other embeddings
    of the global batch negatives; the mean is over this rank's anchors. The gradient flows through
    the gathered embeddings, so that the mean over ranks is the loss of the whole batch.

    Args:
        temperature: tau, 0.1 on ImageNet (SimCLR Table 5).
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, embeddings: Tensor, batch: Batch) -> Tensor:
        """Embeddings (2B, D), views stacked view-major, not yet normalised -> scalar loss."""
        with torch.autocast(embeddings.device.type, enabled=False):
            z = F.normalize(_at_least_float32(embeddings), dim=1)
            everyone = distributed.gather_with_gradient(z)
            logits = z @ everyone.T / self.temperature
            anchors = torch.arange(len(z), device=z.device)
            offset = distributed.rank() * len(z)
            itself = F.one_hot(anchors + offset, len(everyone)).bool()
            positives = (anchors + len(z) // 2) % len(z) + offset
            return F.cross_entropy(logits.masked_fill(itself, -torch.inf), positives)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
