"""What a step gives: the losses, and a loss whose ``backward()`` hands over gradients that are finished already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from framework.runtime.distributed import any_over_ranks


class StepOutput(NamedTuple):
    """The result of a forward.

    Attributes:
        loss: weighted sum of the unit losses; its ``backward()`` hands over the finished gradients.
        unit_losses: (U,) detached, unweighted, in the order of the plan's units.
        overflow: bool scalar, the same on every rank: skip this step. ``None`` in float32 and bfloat16, unless the
            network was made with ``skip_nonfinite``.
        hopeless: (U,) bool, of float16: units whose gradients are infinite or NaN at the lowest loss scale, too.
    """

    loss: Tensor
    unit_losses: Tensor
    overflow: Tensor | None = None
    hopeless: Tensor | None = None


def add_gradients(penalty: Tensor, gradients: dict[nn.Parameter, Tensor]) -> None:
    """Add the gradient of ``penalty`` to that of every parameter it depends on."""
    for parameter, gradient in gradients_of(penalty, gradients).items():
        gradients[parameter] = gradients[parameter] + gradient


def gradients_of(penalty: Tensor, parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """Those of the trained parameters that ``penalty`` depends on."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    found = torch.autograd.grad(penalty, trained, allow_unused=True)
    return {p: gradient for p, gradient in zip(trained, found, strict=True) if gradient is not None}


def any_nonfinite(losses: Mapping[int, Tensor], norms: Sequence[Tensor]) -> Tensor:
    """Whether any loss, or any gradient with one of these norms, is infinite or NaN on any rank (bool scalar)."""
    seen = [*losses.values(), *norms]
    return any_over_ranks(~torch.isfinite(torch.stack([x.float() for x in seen])).all())


def handed_over(loss: Tensor, gradients: dict[nn.Parameter, Tensor]) -> Tensor:
    """The loss, attached to the parameters by a node that gives them these gradients."""
    return _HandOver.apply(loss, list(gradients.values()), *gradients)


class _HandOver(torch.autograd.Function):
    """The loss as a function of all parameters, whose gradients are known already."""

    @staticmethod
    def forward(ctx, loss: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx, factor: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradients of this step were handed over already: call the network again")
        torch._foreach_mul_(gradients, factor)
        return (None, None, *gradients)


def step_output(weights: Tensor, losses: dict[int, Tensor], penalty: Tensor | None) -> StepOutput:
    """The units' losses, by number, summed with their weights (U,), which are on the device; without gradients."""
    unit_losses = torch.stack([losses[i] for i in range(len(weights))])
    loss = unit_losses @ weights.to(unit_losses.dtype)
    return StepOutput(loss if penalty is None else loss + penalty, unit_losses)
