"""The blocks of a network, numbered by segment and stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from framework.network import Segment
from framework.network.structure import structure


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
        """Channels of the block's output, which are those of its last convolution."""
        return [m for m in self.module(segments).modules() if isinstance(m, nn.Conv2d)][-1].out_channels


def blocks_of(segments: Sequence[Segment]) -> tuple[Block, ...]:
    """All blocks of the network, in order."""
    owner = {path: s for s, segment in enumerate(segments) for path in segment.paths}
    return tuple(
        Block(block.name, block.steps, owner[block.steps[-1]], stage, number)
        for stage, blocks in enumerate((s.blocks for s in structure(segments[0].backbone).stages), start=1)
        for number, block in enumerate(blocks)
    )
