"""Numeric precision of a training step: autocast, and one dynamic loss scale for each head call (float16 only).

The scale has to act before the backward: in float16 a unit of weight 0.001 loses its cotangents to
underflow, and no factor afterwards restores them.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from framework.runtime.distributed import any_over_ranks
from framework.runtime.errors import UserError

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
START = 2.0**16  # times the loss weight; 1 is the lowest
GROWTH_INTERVAL = 2000


def autocast_type(precision: str) -> torch.dtype | None:
    """The low-precision type of ``precision``, ``None`` for fp32 (which leaves tensors as they come).

    Raises:
        UserError: there is no such precision.
    """
    if precision not in PRECISIONS:
        raise UserError(f"train.precision={precision}: must be one of {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def autocast(device: str, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """``torch.autocast`` in ``dtype``, or nothing for ``None``. Weights are cast once a call, so nothing is cached."""
    if dtype is None:
        return nullcontext()
    return torch.autocast(device, dtype=dtype, cache_enabled=False)


class Scale(NamedTuple):
    """The number that the true value of a gradient is multiplied by: ``factor``, in float16 times a loss scale.

    Attributes:
        factor: on the host.
        loss: a float64 scalar on the device, which the host does not read.
    """

    factor: float
    loss: Tensor | None = None

    def on_device(self) -> Tensor:
        """The number as a float64 scalar on the device (float16 only)."""
        assert self.loss is not None
        return self.loss * self.factor

    def like(self, loss: Tensor) -> Tensor:
        """The number as a scalar of a loss's type, on its device: the gradient that the scaled loss begins with."""
        return torch.full_like(loss, self.factor) if self.loss is None else self.on_device().to(loss.dtype)


class Overflow(NamedTuple):
    """What overflowed in a micro-batch, on whatever rank.

    Attributes:
        skip: bool scalar: skip the step.
        hopeless: (calls,) bool: head calls whose gradients are infinite or NaN, if no lower scale would help.
    """

    skip: Tensor
    hopeless: Tensor


class LossScales(nn.Module):
    """A power-of-two scale for each head call, halved at an overflow, doubled after 2000 steps without one.

    A step is an optimizer step, whatever its number of micro-batches. The buffers are part of a checkpoint. What
    overflows at the lowest scale, where cotangents are about as large as in float32, is not for the scale to mend.

    Args:
        weights: loss weight of each head call; the lower the weight, the larger the scale at the start.
    """

    def __init__(self, weights: list[float]) -> None:
        super().__init__()
        start = [START * 2.0 ** round(-math.log2(w)) if w > 0 else START for w in weights]
        self.scale: Tensor
        self.clean_steps: Tensor
        self.lowest: Tensor
        self.register_buffer("scale", torch.tensor(start, dtype=torch.float64))
        self.register_buffer("lowest", self.scale / START, persistent=False)
        self.register_buffer("clean_steps", torch.zeros(len(weights), dtype=torch.int64))
        self._overflowed: Tensor | None = None  # (calls,) bool, in earlier micro-batches of this step

    def current(self) -> tuple[Tensor, ...]:
        """The scale of each head call as it is now: float64 scalars on the device."""
        return self.scale.to(torch.float64, copy=True).unbind()

    @torch.no_grad()
    def update(self, overflowed: Tensor, last: bool = True) -> Overflow:
        """Note the overflows of a micro-batch; after the last one of an optimizer step, update the scales.

        Collective: what overflowed on one rank counts as overflowed on all.

        Args:
            overflowed: (calls,) bool.
            last: whether the micro-batch is the last one of its step.

        Returns:
            What is to be done about this micro-batch.
        """
        overflowed = any_over_ranks(overflowed)
        helpless = (self.scale <= self.lowest).masked_fill(~overflowed, True).all()
        seen = overflowed if self._overflowed is None else self._overflowed | overflowed
        self._overflowed = None if last else seen
        if last:
            self.clean_steps.add_(1).masked_fill_(seen, 0)
            grown = self.clean_steps >= GROWTH_INTERVAL
            self.scale.mul_(torch.where(seen, 0.5, torch.where(grown, 2.0, 1.0)))
            self.scale.copy_(torch.where(seen, self.scale.maximum(self.lowest), self.scale))
            self.clean_steps.masked_fill_(grown, 0)
        return Overflow(overflowed.any(), overflowed & helpless)


def smaller(a: Scale, b: Scale) -> Scale:
    """Of two scales."""
    if a.loss is b.loss:
        return a if a.factor <= b.factor else b
    return Scale(1.0, torch.minimum(a.on_device(), b.on_device()))


def summed(a: Tensor, scale_a: Scale, b: Tensor, scale_b: Scale) -> tuple[Tensor, Scale]:
    """The sum of two scaled tensors in the smaller of their scales, so that scaling up never overflows; that scale."""
    scale = smaller(scale_a, scale_b)
    if scale is scale_a:
        return torch.add(a, b, alpha=scale.factor / scale_b.factor), scale
    if scale is scale_b:
        return torch.add(b, a, alpha=scale.factor / scale_a.factor), scale
    # One ratio is 1, but the host doesn't know which. As vectors they make the products float32, and only the sum is
    # rounded to float16.
    ratios = (scale.on_device() / own.on_device() for own in (scale_a, scale_b))
    exact = torch.promote_types(a.dtype, torch.float32)
    of_a, of_b = (ratio.to(exact).reshape(1) for ratio in ratios)
    return torch.addcmul(a * of_a, b, of_b).to(a.dtype), scale


def unscale_(gradients: list[Tensor], scale: Scale) -> Tensor:
    """Divide by a loss scale in place; returns whether any element is infinite or NaN (bool scalar)."""
    found = gradients[0].new_zeros(1, dtype=torch.float32)
    inverse = (1.0 / scale.on_device()).to(torch.float32).reshape(1)
    torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, inverse)
    return found[0] > 0
