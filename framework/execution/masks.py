"""Patches that are dropped behind the first segment, in training."""

from __future__ import annotations

import torch
from torch import Tensor

from framework.data.batch import Batch
from framework.execution.drawn import Drawn
from framework.local.masking import Masking
from framework.runtime import distributed


class Masks(Drawn[Masking]):
    """Random masks, of which the rule says how much they hide (He et al. 2022)."""

    def on(self, batch: Batch) -> Batch:
        """The batch with the patches that the segments see, ascending.

        They are drawn by the first rank for the images of all, so that any number of ranks masks alike.
        """
        device, ranks = batch.images.device, distributed.world_size()
        images = len(batch.images) // batch.views
        shape = (batch.views, ranks * images, self.rule.patches)
        drawn = torch.rand(shape, generator=self.generator(0, device), device=device)
        own = distributed.from_first(drawn).chunk(ranks, 1)[distributed.rank()].flatten(0, 1)
        return batch._replace(visible=own.argsort(1)[:, : self.rule.visible].sort(1).values)


def visible_tokens(s: int, x: Tensor, batch: Batch, masking: Masking | None) -> Tensor:
    """Of the first segment's tokens (N, prefix + L, C), those that a batch's masks leave, (N, prefix + K, C).

    Args:
        s: number of the segment whose output ``x`` is; those behind the first give what they are given.
        x: any output, where there are no masks.
        batch: with the masks.
        masking: their rule; ``None`` if there are none.
    """
    if s > 0 or masking is None or batch.visible is None:
        return x
    patches = x[:, masking.prefix :].gather(1, batch.visible.unsqueeze(2).expand(-1, -1, x.shape[2]))
    return torch.cat([x[:, : masking.prefix], patches], 1)
