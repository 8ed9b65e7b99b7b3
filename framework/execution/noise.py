"""Noise on the outputs of segments, in training."""

from __future__ import annotations

import torch
from torch import Tensor

from framework.execution.drawn import Drawn


class Noise(Drawn[float]):
    """Standard normal noise times a fraction of the output's standard deviation (Siddiqui et al. 2024).

    The rule is that fraction. The deviation is over the whole tensor, and the gradient flows through it, too.
    """

    def on(self, x: Tensor, segment: int) -> Tensor:
        """The output of a segment, of any shape, with noise."""
        generator = self.generator(segment, x.device)
        normal = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return x + self.rule * (x.std() * normal)
