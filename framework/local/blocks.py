"""The blocks of a network, and copies of them in heads."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from framework.errors import UserError
from framework.network import Segment
from framework.network.structure import is_map, structure


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
    them in the forward pass lasts under FSDP2 too. BatchNorm's running statistics are the copy's own
    (FACTS M10).

    Args:
        block: what is copied, and followed later.
        momentum: m.
    """

    def __init__(self, block: nn.Module, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.block = copy.deepcopy(block)
        for module in self.block.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach())

    def forward(self, x: Tensor) -> Tensor:
        """The block's output; the gradient flows to ``x``."""
        return self.block(x)

    @torch.no_grad()
    def follow(self, block: nn.Module, amount: Tensor | float) -> None:
        """Move towards the weights of ``block``, ``amount`` (0 or 1) times."""
        live = dict(block.named_parameters())
        copies = [self.block.get_buffer(name) for name in live]
        steps = torch._foreach_sub(list(live.values()), copies)
        torch._foreach_mul_(steps, amount * (1.0 - self.momentum))
        torch._foreach_add_(copies, steps)
