"""Noise on the outputs of segments, in training."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Noise:
    """Standard normal noise times a fraction of the output's standard deviation (Siddiqui et al. 2024).

    It is a function of seed, step, micro-batch and segment, whatever ran before on the same device: a segment that
    runs again, or as a pipeline stage, sees the same noise.

    Attributes:
        fraction: of the standard deviation over the whole tensor, through which the gradient flows, too.
        seed: PyTorch's, of ``torch.manual_seed``.
        step: counted from the first with this seed.
        micro_batch: of the step, counted from 0.
    """

    fraction: float
    seed: int
    step: int = 0
    micro_batch: int = 0

    @classmethod
    def next(cls, fraction: float, previous: Noise | None) -> Noise | None:
        """Of the step after ``previous``; ``None`` without noise."""
        seed = torch.initial_seed()
        steps = previous.step + 1 if previous is not None and previous.seed == seed else 0
        return cls(fraction, seed, steps) if fraction else None

    def of(self, micro_batch: int) -> Noise:
        """That of a micro-batch."""
        return replace(self, micro_batch=micro_batch)

    def on(self, x: Tensor, segment: int) -> Tensor:
        """The output of a segment, of any shape, with noise."""
        (seed,) = np.random.SeedSequence([self.seed, self.step, self.micro_batch, segment]).generate_state(1)
        generator = torch.Generator(x.device).manual_seed(int(seed))
        normal = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return x + self.fraction * (x.std() * normal)
