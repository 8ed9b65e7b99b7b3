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


class EmaCopy(nn.Module):
    """The exponential moving average of a block, which gets no gradient: copy <- m copy + (1 - m) block.

    Its weights are buffers: in the state dict, in no optimizer, and whole on every rank. FSDP2 shards parameters, and
    would lose what is written to them during a forward pass.

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
        self.names = (*(name for name, _ in block.named_parameters()), *moving)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output; the gradient flows to ``x``."""
        return self.block(x)

    @torch.no_grad()
    def follow(self, block: nn.Module, amount: Tensor | float) -> None:
        """Update the average with the weights of ``block``, ``amount`` (0 or 1) times."""
        live = _tensors(block)
        pairs = [(self.block.get_buffer(name), live[name]) for name in self.names]
        follow(pairs, amount * (1.0 - self.momentum))


class PulledCopy(nn.Module):
    """A trained copy of a block that is pulled towards it at every step, as MAN's and MLAAN's Eq. 10 read.

    Its weights are p + c, where p is trained by the optimizer and c is a buffer. The pull w <- m w + (1 - m) block
    changes c alone, because ZeRO and FSDP2 keep weights of their own and would overwrite a change of p. Weight decay
    acts on p.

    The pull before a step starts from the weights of the last forward pass in training, so that it may be made later,
    when the block's weights of that step have come from another stage of a pipeline.

    Args:
        block: what is copied.
        momentum: m.
        when: before or after the step that trains p.
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

    def forward(self, x: Tensor) -> Tensor:
        """The block's output with the weights p + c."""
        weights = self._weights()
        if self.training and self.when == "before":
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
