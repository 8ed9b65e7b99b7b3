"""The learning rate as a pure function of the step, or of the epoch."""

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


def learning_rate_of_epoch(epoch: int, epochs: int, warmup_epochs: float, base_lr: float) -> float:
    """The schedule of MLAAN's and InfoPro's code: one rate an epoch, of half a cosine over all epochs.

    In the first epochs it is blended with a ramp that falls from 0.01.

    Args:
        epoch: from 0; the rate of the last one is 0.
        epochs: length of the run.
        warmup_epochs: how many are blended, 10 in the code.
        base_lr: rate that the cosine starts from.

    Raises:
        ValueError: the epoch is outside the run.
    """
    if not 0 <= epoch <= epochs:
        raise ValueError(f"epoch {epoch} lies outside a run of {epochs} epochs")
    cosine = base_lr * 0.5 * (1 + math.cos(math.pi * min(epoch + 1, epochs) / epochs))
    if epoch >= warmup_epochs:
        return cosine
    return cosine * epoch / warmup_epochs + 0.01 * (warmup_epochs - epoch) / warmup_epochs
