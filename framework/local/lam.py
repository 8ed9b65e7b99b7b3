"""MLAAN's Leap Augmented Module: copies of later blocks between a segment and its classifier.

With A_j the trainable copies and E the EMA copy of the first listed block,
``z -> A_n(... A_2(A_1(z) + E(z)))`` in the authors' code; ``Copies`` has the other readings of the paper.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal

import torch
from torch import Tensor, nn

from framework.data.batch import Batch
from framework.local import lam_tables
from framework.local.blocks import Block, EmaCopy, PulledCopy, blocks_of, check_maps
from framework.local.units import ReadingHead, Task
from framework.network import Segment, Shape
from framework.runtime.errors import UserError


@dataclass(frozen=True)
class Copies:
    """How the copies in a LAM learn.

    Attributes:
        form: the first listed block alone has a moving average, as in the authors' code, or every one, as in
            the paper's Figure 3.
        weights: a trained and an averaged copy whose outputs add up, or a single one that is trained and pulled
            towards its block, as Eqs. 9 and 10 read.
        momentum: m of the moving average.
        statistics: BatchNorm's running statistics follow too; they don't in the authors' code.
        when: the average takes in the weights from before or after a step; before in the authors' code.
    """

    form: Literal["sum_first", "ema_chain"] = "sum_first"
    weights: Literal["two_copies", "trained_and_pulled"] = "two_copies"
    momentum: float = 0.995
    statistics: bool = False
    when: Literal["before", "after"] = "before"


class Lam(nn.Module):
    """The chain of copies; they start equal to the blocks.

    Args:
        blocks: what to copy, in order.
        segments: the network's.
        copies: how they learn.
    """

    def __init__(self, blocks: Sequence[Block], segments: Sequence[Segment], copies: Copies) -> None:
        super().__init__()
        modules = [block.module(segments) for block in blocks]
        self._statistics = copies.statistics
        self.followed = tuple(blocks if copies.form == "ema_chain" else blocks[:1])
        following, others = modules[: len(self.followed)], modules[len(self.followed) :]
        self.aug: nn.ModuleList
        self.ema: nn.ModuleList
        if copies.weights == "trained_and_pulled":
            self.aug = nn.ModuleList(PulledCopy(module, copies.momentum) for module in following)
            self.aug.extend(copy.deepcopy(module) for module in others)
            self.ema = nn.ModuleList()
        else:
            self.aug = nn.ModuleList(copy.deepcopy(module) for module in modules)
            self.ema = nn.ModuleList(
                EmaCopy(module, copies.momentum, copies.statistics) for module in following
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) at the segment's end -> (N, C', H', W') as at the end of the last block."""
        if x.device.type == "cpu" and x.is_contiguous():
            x = _ChannelsLast.apply(x)  # a tenth faster on the CPU
        for block, average in zip_longest(self.aug, self.ema):
            x = block(x) if average is None else block(x) + average(x)
        return x

    @property
    def may_be_late(self) -> bool:
        """Nothing that copies follow, or that they are, changes but for the blocks' weights at a step."""
        return bool(self.ema) and not self._statistics

    def follow(self, segments: Sequence[Segment], amount: Tensor | float) -> None:
        """Move the copies that follow towards their blocks, ``amount`` (0 or 1) times."""
        for copied, block in zip(self.ema or self.aug, self.followed, strict=False):
            assert isinstance(copied, EmaCopy | PulledCopy)
            copied.follow(block.module(segments), amount)

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
        updated: whether the copies follow.
        when: before or after the optimizer step.
    """

    def __init__(
        self, lam: Lam, head: nn.Module, updated: bool = True, when: Literal["before", "after"] = "before"
    ) -> None:
        super().__init__()
        self.lam, self.head, self.updated, self.when = lam, head, updated, when
        self.reads = tuple(dict.fromkeys(block.segment for block in lam.followed))
        self.may_be_late = lam.may_be_late

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
        """Those of the blocks that copies follow."""
        followed = self.lam.followed if self.updated else ()
        return [parameter for block in followed for parameter in block.module(segments).parameters()]

    def update_copies(self, segments: Sequence[Segment], amount: Tensor | float) -> None:
        """The copies follow their blocks."""
        if self.updated:
            self.lam.follow(segments, amount)


@dataclass(frozen=True)
class LamBuilder:
    """Builds the LAMs of a plan.

    Attributes:
        task: with the segments whose blocks are copied.
        lists: names of blocks for segments by name, in place of the published or the rule's.
        copies: how they learn.

    Raises:
        UserError: ``lists`` names a segment or block that does not exist, or a block that is not later.
    """

    task: Task
    lists: Mapping[str, Sequence[str]]
    copies: Copies

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
        lam = Lam(blocks, self.task.segments, self.copies)
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
            if not self.lists[name]:
                raise UserError(f"method.lam_blocks.{name}: must name at least one of {', '.join(by_name)}")
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
