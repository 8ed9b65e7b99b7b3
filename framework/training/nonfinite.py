"""Losses and gradients that are infinite or NaN: what they are called, and when they end a run."""

from __future__ import annotations

import math

from framework.config.recipe import Recipe
from framework.runtime.errors import UserError
from framework.training.position import Position


def nonfinite(losses: dict[str, float], hopeless: list[str]) -> str | None:
    """What is infinite or NaN, in words: a loss, or the gradients of the units ``hopeless``."""
    for unit, loss in losses.items():
        if not math.isfinite(loss):
            return f"the loss of unit {unit} is {loss}"
    if hopeless:
        more = f" and {len(hopeless) - 3} more" if len(hopeless) > 3 else ""
        units = f"{'unit' if len(hopeless) == 1 else 'units'} {', '.join(hopeless[:3])}{more}"
        return f"the gradient of {units} is infinite or NaN whatever the loss scale"
    return None


def count_nonfinite(recipe: Recipe, position: Position, step: int, bad: str | None, skipped: bool) -> None:
    """Count a step whose loss or gradient is not finite, and stop where the recipe says so.

    Args:
        recipe: of the run.
        position: counts them.
        step: number of the step.
        bad: what is not finite in it, in words.
        skipped: whether the step was skipped.

    Raises:
        UserError: a loss or gradient that is not finite and may not be skipped; too many steps that were.
    """
    faults, lr = recipe.faults, recipe.optim.lr
    if bad and faults.nonfinite == "stop":
        raise UserError(
            f"{bad} at step {step}: lower optim.lr={lr}, look at the data, or "
            f"set faults.nonfinite=skip; the last checkpoint is as it was"
        )
    # In float16 a gradient may overflow, at other than the lowest loss scale.
    if bad or (skipped and recipe.train.precision != "fp16"):
        position.nonfinite += 1
        if position.nonfinite > faults.nonfinite_limit:
            raise UserError(
                f"step {step} is the {position.nonfinite}th with a loss or gradient that is not finite"
                f"{f' ({bad})' if bad else ''}, and faults.nonfinite_limit={faults.nonfinite_limit}: "
                f"lower optim.lr={lr}, or look at the data"
            )
