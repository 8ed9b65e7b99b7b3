"""The blocks of a network, and copies of them in heads."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from framework.network import Segment
from framework.network.structure import is_map, structure
from framework.runtime.errors import UserError


class Block(NamedTuple):
    """A block of the backbone, and where it is.

    Attributes:
        name: dotted, in the backbone (``"layer2.0"``).
        steps: names of the modules that it runs in order.
        segment: number of the segment that it belongs to.
        stage: counted from 1.
        number: within the stage, from 0.
    """

    name: str
    steps: tuple[str, ...]
    segment: int
    stage: int
    number: int

    def module(self, segments: Sequence[Segment]) -> nn.Module:
        """The block as it is now."""
        backbone = segments[self.segment].backbone
        first, *others = (backbone.get_submodule(step) for step in self.steps)
        return nn.Sequential(first, *others) if others else first

    def channels(self, segments: Sequence[Segment]) -> int:
        """Of the block's output: those of its last convolution."""
        return [m for m in self.module(segments).modules() if isinstance(m, nn.Conv2d)][-1].out_channels


def blocks_of(segments: Sequence[Segment]) -> tuple[Block, ...]:
    """All blocks of the network, in order."""
    owner = {path: s for s, segment in enumerate(segments) for path in segment.paths}
    return tuple(
        Block(block.name, block.steps, owner[block.steps[-1]], stage, number)
        for stage, blocks in enumerate((s.blocks for s in structure(segments[0].backbone).stages), start=1)
        for number, block in enumerate(blocks)
    )


def own_copy(segment: Segment) -> nn.Sequential:
    """A copy of what a segment runs.

    Raises:
        UserError: the segment takes no maps, as heads do.
    """
    check_maps(segment)
    return nn.Sequential(*(copy.deepcopy(module) for module in segment.modules()))


def check_maps(segment: Segment) -> None:
    """Raises:
    UserError: the segment does not work on maps (N, C, H, W), so that no head can run a copy of it.
    """
    if segment.to_map is not is_map:
        network = type(segment.backbone).__name__
        raise UserError(f"no head can copy blocks of {network}: they do not work on maps (N, C, H, W)")


class EmaCopy(nn.Module):
    """A copy of a block that follows it slowly and gets no gradient: copy <- m copy + (1 - m) block.

    Its weights are buffers: in the state dict, in no optimizer, and whole on every rank, so that writing to
    them in the forward pass lasts under FSDP2 too.

    Args:
        block: what is copied, and followed later.
        momentum: m.
        statistics: BatchNorm's running statistics follow, too; otherwise they are the copy's own.
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
        """Move towards the weights of ``block``, ``amount`` (0 or 1) times."""
        copies = [self.block.get_buffer(name) for name in self.names]
        _move(copies, copies, block, self.names, amount * (1.0 - self.momentum))


class PulledCopy(nn.Module):
    """A trained copy of a block that is pulled towards it at every step, as MAN's and MLAAN's Eq. 10 read.

    With p what the optimizer trains and c a buffer, its weights are p + c; the pull w <- m w + (1 - m) block
    moves c alone. So it lasts under engines that keep the weights elsewhere (ZeRO, FSDP2). Weight decay sees p.

    Args:
        block: what is copied, and pulls later.
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
    moved: list[Tensor], now: list[Tensor], block: nn.Module, names: tuple[str, ...], share: Tensor | float
) -> None:
    """Add to ``moved`` a share of the way from ``now`` to what ``block`` calls ``names``."""
    live: dict[str, Tensor] = dict(block.named_buffers())
    live.update(block.named_parameters())
    steps = torch._foreach_sub([live[name] for name in names], now)
    torch._foreach_mul_(steps, share)
    torch._foreach_add_(moved, steps)
