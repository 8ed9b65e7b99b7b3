"""Copies of a network's segments and blocks, in heads."""

from __future__ import annotations

import copy

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
        for module in self.block.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach())
        moving = [n for n, b in block.named_buffers() if b.is_floating_point()] if statistics else []
        self.names = (*(name for name, _ in block.named_parameters()), *moving)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output; the gradient flows to ``x``."""
        return self.block(x)

    @torch.no_grad()
    def follow(self, block: nn.Module, amount: Tensor | float) -> None:
        """Update the average with the weights of ``block``, ``amount`` (0 or 1) times."""
        copies = [self.block.get_buffer(name) for name in self.names]
        _move(copies, copies, block, self.names, amount * (1.0 - self.momentum))


class PulledCopy(nn.Module):
    """A trained copy of a block that is pulled towards it at every step, as MAN's and MLAAN's Eq. 10 read.

    Its weights are p + c, where p is trained by the optimizer and c is a buffer. The pull w <- m w + (1 - m) block
    changes c alone, because ZeRO and FSDP2 keep weights of their own and would overwrite a change of p. Weight decay
    acts on p.

    Args:
        block: what is copied.
        momentum: m.
    """

    def __init__(self, block: nn.Module, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.block = copy.deepcopy(block)
        self.names = tuple(name for name, _ in self.block.named_parameters())
        for name in self.names:
            self.register_buffer(_flat(name), torch.zeros_like(self.block.get_parameter(name)))

    def forward(self, x: Tensor) -> Tensor:
        """The block's output with the weights p + c."""
        return functional_call(self.block, self._weights(), (x,))

    @torch.no_grad()
    def follow(self, block: nn.Module, amount: Tensor | float) -> None:
        """Pull the weights towards those of ``block``, ``amount`` (0 or 1) times."""
        offsets = [self.get_buffer(_flat(name)) for name in self.names]
        _move(offsets, list(self._weights().values()), block, self.names, amount * (1.0 - self.momentum))

    def _weights(self) -> dict[str, Tensor]:
        return {n: self.block.get_parameter(n) + self.get_buffer(_flat(n)) for n in self.names}


def _flat(name: str) -> str:
    return name.replace(".", "_") + "_pull"


def _move(
    moved: list[Tensor], now: list[Tensor], block: nn.Module, names: tuple[str, ...], fraction: Tensor | float
) -> None:
    """Add to ``moved`` a fraction of the difference between the tensors ``names`` of ``block`` and ``now``."""
    live: dict[str, Tensor] = dict(block.named_buffers())
    live.update(block.named_parameters())
    steps = torch._foreach_sub([live[name] for name in names], now)
    torch._foreach_mul_(steps, fraction)
    torch._foreach_add_(moved, steps)
