"""Random numbers that are a function of the step, so that whatever runs again sees the same."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, Self, TypeVar

import numpy as np
import torch

Rule = TypeVar("Rule")


@dataclass(frozen=True)
class Drawn(Generic[Rule]):
    """What a plan draws in a micro-batch.

    It is a function of seed, step and micro-batch, whatever ran before on the same device: as a pipeline stage, after a
    new start, and where something runs twice, the same is drawn.

    Attributes:
        rule: what to draw.
        seed: PyTorch's, of ``torch.manual_seed``.
        step: counted from the first with this seed.
        micro_batch: of the step, counted from 0.
    """

    rule: Rule
    seed: int
    step: int = 0
    micro_batch: int = 0

    @classmethod
    def next(cls, rule: Rule | None, previous: Drawn[Rule] | None) -> Self | None:
        """Of the step after ``previous``; ``None`` where there is nothing to draw."""
        seed = torch.initial_seed()
        steps = previous.step + 1 if previous is not None and previous.seed == seed else 0
        return cls(rule, seed, steps) if rule else None

    def of(self, micro_batch: int) -> Self:
        """That of a micro-batch."""
        return replace(self, micro_batch=micro_batch)

    def generator(self, number: int, device: torch.device) -> torch.Generator:
        """One of several generators of the micro-batch, by number."""
        (seed,) = np.random.SeedSequence([self.seed, self.step, self.micro_batch, number]).generate_state(1)
        return torch.Generator(device).manual_seed(int(seed))
