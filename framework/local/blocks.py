"""The residual blocks of a network, and copies of them in heads."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from framework.network import Segment


class Block(NamedTuple):
    """A residual block of the backbone.

    Attributes:
        name: dotted, in the backbone (``"layer2.0"``).
        segment: number of the segment that it belongs to.
        stage: counted from 1.
        number: within the stage, from 0.
    """

    name: str
    segment: int
    stage: int
    number: int

    def module(self, segments: Sequence[Segment]) -> nn.Module:
        """The block as it is now."""
        return segments[self.segment].backbone.get_submodule(self.name)

    def channels(self, segments: Sequence[Segment]) -> int:
        """Of the block's output: those of its last convolution."""
        return [m for m in self.module(segments).modules() if isinstance(m, nn.Conv2d)][-1].out_channels


def residual_blocks(segments: Sequence[Segment]) -> tuple[Block, ...]:
    """All blocks in order: the children called by a number (``layer2.0``); stages are their parents."""
    blocks: list[Block] = []
    stages: list[str] = []
    for s, segment in enumerate(segments):
        for path in segment.paths:
            stage, _, number = path.rpartition(".")
            if stage and number.isdigit():
                stages += [stage] if stage not in stages else []
                blocks.append(Block(path, s, len(stages), int(number)))
    return tuple(blocks)


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
