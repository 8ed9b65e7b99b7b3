"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math


def learning_rate(step: int, total_steps: int, warmup_steps: int, base_lr: float) -> float:
    """Linear warm-up, then half a cosine to 0 without restart (LoCo, section 5.1).

    Args:
        step: number of the step, from 0. As in SimCLR's code, the very first step of a warm-up has rate 0.
        total_steps: length of the run; at ``step == total_steps`` the rate is 0.
        warmup_steps: steps until ``base_lr`` is reached; 0 starts there.
        base_lr: highest rate.

    Raises:
        ValueError: the step is outside the run.
    """
    if not 0 <= step <= total_steps:
        raise ValueError(f"step {step} lies outside a run of {total_steps} steps")
    if step < warmup_steps:
        return base_lr * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return base_lr * 0.5 * (1 + math.cos(math.pi * progress))
