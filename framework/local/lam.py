"""MLAAN's Leap Augmented Module: copies of later blocks between a segment and its classifier (FACTS D3).

With A_j the trainable copies and E the EMA copy of the first listed block,
``z -> A_n(... A_2(A_1(z) + E(z)))``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from framework.batch import Batch
from framework.errors import UserError
from framework.local import lam_tables
from framework.local.blocks import Block, EmaCopy, blocks_of, check_maps
from framework.local.units import ReadingHead, Task
from framework.network import Segment, Shape


class Lam(nn.Module):
    """The chain of copies; they start equal to the blocks.

    Args:
        blocks: what to copy, in order.
        segments: the network's.
        momentum: m of the EMA copy.
    """

    def __init__(self, blocks: Sequence[Block], segments: Sequence[Segment], momentum: float) -> None:
        super().__init__()
        self.followed = blocks[0]
        self.aug = nn.ModuleList(copy.deepcopy(block.module(segments)) for block in blocks)
        self.ema = EmaCopy(blocks[0].module(segments), momentum)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) at the segment's end -> (N, C', H', W') as at the end of the last block."""
        first, *others = self.aug
        if x.device.type == "cpu" and x.is_contiguous():
            x = _ChannelsLast.apply(x)  # a tenth faster on the CPU
        x = first(x) + self.ema(x)
        for block in others:
            x = block(x)
        return x

    @torch.no_grad()
    def output_shape(self, shape: Shape) -> Shape:
        """Shape of the output for an input of ``shape``, by running one image."""
        was_training = self.training
        x = self.eval()(next(self.parameters()).new_zeros(1, *shape))
        self.train(was_training)
        return Shape(*x.shape[1:])


class _ChannelsLast(torch.autograd.Function):
    """Channels-last order; the gradient returns in plain order, else the segment below would be slow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


class LamHead(ReadingHead):
    """A head behind a LAM.

    Args:
        lam: the copies.
        head: reads their output.
        updated: whether the EMA copy moves.
    """

    def __init__(self, lam: Lam, head: nn.Module, updated: bool = True) -> None:
        super().__init__()
        self.lam, self.head, self.updated = lam, head, updated
        self.reads = (lam.followed.segment,)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """Scalar loss on the segment output ``x`` (N, C, H, W)."""
        return self.head(self.lam(x), batch)

    @property
    def contrasts(self) -> bool:
        """As the inner head."""
        return getattr(self.head, "contrasts", False)

    def embed(self, x: Tensor) -> Tensor:
        """As the inner head's."""
        return self.head.embed(self.lam(x))  # type: ignore[operator]

    def score(self, embeddings: Tensor, batch: Batch) -> Tensor:
        """As the inner head's."""
        return self.head.score(embeddings, batch)  # type: ignore[operator]

    def read_parameters(self, segments: Sequence[Segment]) -> list[nn.Parameter]:
        """Those of the block that the EMA copy follows."""
        return list(self.lam.followed.module(segments).parameters()) if self.updated else []

    def update_copies(self, segments: Sequence[Segment], amount: Tensor | float) -> None:
        """EMA of the first listed block, with its weights before the step (FACTS M10)."""
        if self.updated:
            self.lam.ema.follow(self.lam.followed.module(segments), amount)


@dataclass(frozen=True)
class LamBuilder:
    """Builds the LAMs of a plan.

    Attributes:
        task: with the segments whose blocks are copied.
        lists: names of blocks for segments by name, in place of the published or the rule's.
        momentum: m of the EMA copies.

    Raises:
        UserError: ``lists`` names a segment or block that does not exist, or a block that is not later.
    """

    task: Task
    lists: Mapping[str, Sequence[str]]
    momentum: float

    def __post_init__(self) -> None:
        if unknown := set(self.lists) - set(self.task.names):
            raise UserError(
                f"method.lam_blocks: no segment {min(unknown)}; they are called {', '.join(self.task.names)}"
            )

    def build(self, segment: int) -> tuple[Lam, Shape]:
        """The LAM on the end of a segment, and the shape of its output.

        Raises:
            UserError: the blocks do not fit on top of each other.
        """
        return self._lam(segment, self.blocks(segment))

    def next_block(self, segment: int) -> tuple[Lam, Shape]:
        """The same with a list of one block, the next."""
        return self._lam(segment, self._later_blocks(segment)[:1])

    def _lam(self, segment: int, blocks: Sequence[Block]) -> tuple[Lam, Shape]:
        lam = Lam(blocks, self.task.segments, self.momentum)
        try:
            return lam, lam.output_shape(self.task.shapes[segment])
        except RuntimeError as error:
            copied = ", ".join(b.name for b in blocks)
            name = self.task.names[segment]
            raise UserError(
                f"method.lam_blocks.{name}: {copied} can't follow each other: {str(error).splitlines()[0]}"
            ) from error

    def blocks(self, segment: int) -> list[Block]:
        """What the LAM of a segment copies."""
        later = self._later_blocks(segment)
        name, blocks = self.task.names[segment], blocks_of(self.task.segments)
        if name in self.lists:
            by_name = {b.name: b for b in later}
            if wrong := [wanted for wanted in self.lists[name] if wanted not in by_name]:
                raise UserError(
                    f"method.lam_blocks.{name}: {wrong[0]} is no later block; {', '.join(by_name)} are"
                )
            return [by_name[wanted] for wanted in self.lists[name]]
        end = max(
            0, sum(b.segment <= segment for b in blocks) - 1
        )  # a stem of its own is like the first block
        widths = [b.channels(self.task.segments) for b in blocks]
        of_stages = tuple({b.stage: width for b, width in zip(blocks, widths, strict=True)}.values())
        modules = len({b.segment for b in blocks})
        listed = lam_tables.published(of_stages, blocks, modules, blocks[end])
        if listed is not None:
            return listed
        by_width = lam_tables.stages_by_width(blocks, widths)
        return lam_tables.by_rule(by_width, by_width[end])

    def _later_blocks(self, segment: int) -> list[Block]:
        check_maps(self.task.segments[segment])
        later = [b for b in blocks_of(self.task.segments) if b.segment > segment]
        if not later:
            name = self.task.names[segment]
            raise UserError(
                f"a head that copies later blocks can't stand on segment {name}: no block follows it"
            )
        return later
