"""Convolutions and linear layers whose backward pass sends errors down through other weights than the forward's."""

from __future__ import annotations

import zlib
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework.runtime.errors import UserError

Feedback = Literal["exact", "random", "sign"]


def use_feedback(network: nn.Module, kind: Feedback) -> None:
    """Give every convolution and linear layer below ``network`` another backward pass; names of weights stay.

    Args:
        network: its children are replaced.
        kind: "random": fixed random weights carry the error down (feedback alignment, Lillicrap et al. 2016), drawn
            like He's initialization. They are a function of the layer's name, and in no checkpoint. "sign": the
            weights' signs, times one number that gives them the norm of the weights (Liao et al. 2016).

    Raises:
        UserError: another kind of convolution.
    """
    for path, layer in list(network.named_modules()):
        if type(layer) not in (nn.Conv2d, nn.Linear):
            if isinstance(layer, nn.Conv2d | nn.Linear):
                raise UserError(
                    f"feedback alignment has no backward pass for {path}, a {type(layer).__name__}"
                )
            continue
        parent, _, name = path.rpartition(".")
        new: nn.Module = FeedbackConv2d(layer) if isinstance(layer, nn.Conv2d) else FeedbackLinear(layer)
        fixed = _random_like(layer.weight, path) if kind == "random" else None
        new.register_buffer("feedback", fixed, persistent=False)
        setattr(network.get_submodule(parent), name, new)


class FeedbackConv2d(nn.Module):
    """``nn.Conv2d`` with the error sent down through ``feedback``; ``None`` stands for the weights' signs."""

    feedback: Tensor | None

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            raise UserError("feedback alignment has no backward pass for padding other than by zeros")
        self.weight, self.bias = layer.weight, layer.bias
        self.options = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        y: Tensor = _Convolution.apply(*_lowered(x, self.weight), self.feedback, self.options)
        return y if self.bias is None else y + self.bias.to(y.dtype).view(1, -1, 1, 1)


class FeedbackLinear(nn.Module):
    """``nn.Linear``, likewise."""

    feedback: Tensor | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D')."""
        y: Tensor = _Linear.apply(*_lowered(x, self.weight), self.feedback)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, feedback: Tensor | None, options: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, weight, feedback)
        ctx.options = options
        return F.conv2d(x, weight, None, *options)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, feedback = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.options
        down = _signs(weight) if feedback is None else feedback.to(weight.dtype)
        wanted = (*ctx.needs_input_grad[:2], False)
        # The gradient of the weights depends on their shape alone.
        below, own, _ = torch.ops.aten.convolution_backward(
            gradient, x, down, None, stride, padding, dilation, False, (0, 0), groups, wanted
        )
        return below, own, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, feedback: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, feedback)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, feedback = ctx.saved_tensors
        down = _signs(weight) if feedback is None else feedback.to(weight.dtype)
        below = gradient @ down if ctx.needs_input_grad[0] else None
        own = gradient.flatten(0, -2).T @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return below, own, None


def _lowered(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the type that autocast, which does not look into functions, would give a convolution."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return x.to(dtype), weight.to(dtype)


def _signs(weight: Tensor) -> Tensor:
    return weight.sign() * (weight.norm() / weight.numel() ** 0.5)


def _random_like(weight: Tensor, name: str) -> Tensor:
    fan_in = weight[0].numel()
    normal = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(weight.shape)
    return torch.from_numpy(normal * (2 / fan_in) ** 0.5).to(weight.dtype)
