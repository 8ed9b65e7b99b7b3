"""Copies of a network's segments and blocks, in heads."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from framework.network import Segment
from framework.network.parts import part


def own_copy(segment: Segment) -> nn.Sequential:
    """A copy of what a segment runs, in the layout of the network."""
    module = copy.deepcopy(part(segment.backbone, segment.steps))
    return module if type(module) is nn.Sequential and len(segment.paths) > 1 else nn.Sequential(module)


class Follower(nn.Module):
    """A module with buffers that follow weights element by element, between steps.

    No forward pass writes to them, so an engine may cut them into slices as it cuts the weights.

    Attributes:
        lags: whether the weights to follow may come later than the optimizer's step, from another stage of a pipeline.
    """

    lags = False

    def followers(self) -> list[Tensor]:
        """These buffers."""
        raise NotImplementedError


def followers(module: nn.Module) -> list[Tensor]:
    """Those of all followers in a module."""
    inside = (inner for inner in module.modules() if isinstance(inner, Follower))
    return [buffer for follower in inside for buffer in follower.followers()]


class EmaCopy(Follower):
    """The exponential moving average of a block, which gets no gradient: copy <- m copy + (1 - m) block.

    Its weights are buffers: in the state dict, and in no optimizer.

    Args:
        block: what is copied.
        momentum: m.
        statistics: whether BatchNorm's running statistics are averages of the block's, too, or the copy's own.
    """

    def __init__(self, block: nn.Module, momentum: float, statistics: bool = False) -> None:
        super().__init__()
        self.momentum = momentum
        self.block = copy.deepcopy(block)
        without_parameters(self.block)
        moving = [n for n, b in block.named_buffers() if b.is_floating_point()] if statistics else []
        self._weights = [name for name, _ in block.named_parameters()]
        self.names = (*self._weights, *moving)

    def followers(self) -> list[Tensor]:
        """The averaged weights; running statistics are moved by forward passes, too."""
        return [self.block.get_buffer(name) for name in self._weights]

    def forward(self, x: Tensor) -> Tensor:
        """The block's output; the gradient flows to ``x``."""
        return self.block(x)

    @torch.no_grad()
    def follow(self, block: nn.Module, amount: Tensor | float) -> None:
        """Update the average with the weights of ``block``, ``amount`` (0 or 1) times."""
        live = _tensors(block)
        pairs = [(self.block.get_buffer(name), live[name]) for name in self.names]
        follow(pairs, amount * (1.0 - self.momentum))


class PulledCopy(Follower):
    """A trained copy of a block that is pulled towards it at every step, as MAN's and MLAAN's Eq. 10 read.

    Its weights are p + c, where p is trained by the optimizer and c is a buffer. The pull w <- m w + (1 - m) block
    changes c alone, because engines that shard keep weights of their own and would overwrite a change of p. Weight
    decay acts on p.

    Args:
        block: what is copied.
        momentum: m.
        when: before or after the step that trains p.

    The pull before a step starts from the weights that the copy had in its last forward pass in training. Where the
    block's weights lag, a copy of those is kept.
    """

    def __init__(
        self, block: nn.Module, momentum: float, when: Literal["before", "after"] = "before"
    ) -> None:
        super().__init__()
        self.momentum, self.when = momentum, when
        self._ran: dict[str, Tensor] | None = None
        self.block = copy.deepcopy(block)
        self.names = tuple(name for name, _ in self.block.named_parameters())
        self._places = _places(self.block)
        for name in self.names:
            self.register_buffer(_flat(name), torch.zeros_like(self.block.get_parameter(name)))

    def followers(self) -> list[Tensor]:
        """The pulls c."""
        return [self.get_buffer(_flat(name)) for name in self.names]

    def forward(self, x: Tensor) -> Tensor:
        """The block's output with the weights p + c."""
        weights = self._weights()
        if self.lags and self.training and self.when == "before":
            self._ran = {name: weight.detach() for name, weight in weights.items()}
        placed = {place: weights[name] for place, name in self._places.items()}
        # PyTorch's own tying puts a tensor without gradient back where a block holds one module under two names.
        return functional_call(self.block, placed, (x,), tie_weights=False)

    @torch.no_grad()
    def follow(self, block: nn.Module, amount: Tensor | float) -> None:
        """Pull the weights towards those of ``block``, ``amount`` (0 or 1) times."""
        live, now = _tensors(block), self._ran or self._weights()
        steps = torch._foreach_sub([live[name] for name in self.names], list(now.values()))
        torch._foreach_mul_(steps, amount * (1.0 - self.momentum))
        torch._foreach_add_([self.get_buffer(_flat(name)) for name in self.names], steps)
        self._ran = None  # as large as the block

    def _weights(self) -> dict[str, Tensor]:
        return {n: self.block.get_parameter(n) + self.get_buffer(_flat(n)) for n in self.names}


def _places(block: nn.Module) -> dict[str, str]:
    """Where each parameter stands, once a module, and its first name."""
    first = {parameter: name for name, parameter in block.named_parameters()}
    return {
        f"{path}.{name}" if path else name: first[parameter]
        for path, module in block.named_modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
    }


def _flat(name: str) -> str:
    return name.replace(".", "_") + "_pull"


def _tensors(block: nn.Module) -> dict[str, Tensor]:
    return {**dict(block.named_buffers()), **dict(block.named_parameters())}


def without_parameters(module: nn.Module) -> None:
    """Make all parameters buffers."""
    for inner in module.modules():
        for name, parameter in list(inner.named_parameters(recurse=False)):
            delattr(inner, name)
            inner.register_buffer(name, parameter.detach())


@torch.no_grad()
def follow(pairs: Sequence[tuple[Tensor, Tensor]], fraction: Tensor | float) -> None:
    """Move the first tensor of each pair by a fraction of the way to the second."""
    copies, live = ([pair[i] for pair in pairs] for i in (0, 1))
    if isinstance(fraction, Tensor) and copies:
        fraction = fraction.to(copies[0].device)
    steps = torch._foreach_sub(live, copies)
    torch._foreach_mul_(steps, fraction)
    torch._foreach_add_(copies, steps)
