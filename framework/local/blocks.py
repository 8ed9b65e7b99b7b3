"""The blocks of a network, numbered by segment and stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from framework.network import Segment
from framework.network.layouts import ToMap
from framework.network.parts import part
from framework.network.structure import Steps


class Block(NamedTuple):
    """A block of the backbone, and where it is.

    Attributes:
        name: dotted, in the backbone (``"layer2.0"``).
        steps: what it runs.
        to_map: turns its output into a map (N, C, H, W).
        channels: of that map.
        segment: number of the segment that it belongs to.
        stage: counted from 1.
        number: within the stage, from 0.
    """

    name: str
    steps: Steps
    to_map: ToMap
    channels: int
    segment: int
    stage: int
    number: int

    def module(self, segments: Sequence[Segment]) -> nn.Module:
        """The block as it is now."""
        return part(segments[self.segment].backbone, self.steps)


def blocks_of(segments: Sequence[Segment]) -> tuple[Block, ...]:
    """All blocks of the network, in order."""
    owner = {name: s for s, segment in enumerate(segments) for name in segment.blocks}
    return tuple(
        Block(block.name, block.steps, block.to_map, block.channels, owner[block.name], stage, number)
        for stage, blocks in enumerate((s.blocks for s in segments[-1].stages), start=1)
        for number, block in enumerate(blocks)
    )
