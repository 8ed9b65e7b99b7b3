"""MLAAN's Leap Augmented Module: copies of later blocks between a segment and its classifier.

``z -> A_n(... A_2(A_1(z)))`` with A_j the trained copies, of which the first is pulled towards its block. The authors'
code has ``z -> A_n(... A_2(A_1(z) + E(z)))``, with E the moving average of that block. ``Copies`` has these readings.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from framework.local.blocks import Block
from framework.local.copies import EmaCopy, PulledCopy
from framework.local.head import Head, WrappingHead
from framework.local.lam_copies import Copies
from framework.network import Segment, Shape
from framework.network.layouts import is_map


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
        self.copies = copies
        self.followed = tuple(blocks if copies.form == "ema_chain" else blocks[:1])
        self.maps = blocks[0].to_map is is_map
        self.to_map = blocks[-1].to_map
        first, others = modules[: len(self.followed)], modules[len(self.followed) :]
        self.aug: nn.ModuleList
        self.ema: nn.ModuleList
        self._following: Sequence[EmaCopy | PulledCopy]
        if copies.weights == "trained_and_pulled":
            self._following = [PulledCopy(module, copies.momentum, copies.when) for module in first]
            self.aug = nn.ModuleList([*self._following, *(copy.deepcopy(module) for module in others)])
            self.ema = nn.ModuleList()
        else:
            self._following = [EmaCopy(module, copies.momentum, copies.statistics) for module in first]
            self.aug = nn.ModuleList(copy.deepcopy(module) for module in modules)
            self.ema = nn.ModuleList(self._following)

    def forward(self, x: Tensor) -> Tensor:
        """What there is at the segment's end -> the same at the end of the last block, in the network's layout."""
        if self.maps and x.device.type == "cpu" and x.is_contiguous():
            x = _ChannelsLast.apply(x)  # a tenth faster on the CPU
        for block, average in zip_longest(self.aug, self.ema):
            x = block(x) if average is None else block(x) + average(x)
        return x

    @property
    def may_lag(self) -> bool:
        """Whether the copies need nothing but the blocks' weights before each step.

        Not so for BatchNorm's statistics, which move in every forward pass.
        """
        return not self.copies.statistics

    def will_lag(self) -> None:
        """See ``Head.will_lag``."""
        for copied in self._following:
            copied.lags = True

    def follow(self, segments: Sequence[Segment], amount: Tensor | float) -> None:
        """Move the copies that follow towards their blocks, ``amount`` (0 or 1) times."""
        for copied, block in zip(self._following, self.followed, strict=True):
            copied.follow(block.module(segments), amount)

    def under(self, head: Head, updated: bool = True) -> LamHead:
        """A head behind these copies; ``updated`` says whether they follow their blocks."""
        return LamHead(self, head, updated)

    @torch.no_grad()
    def output_shape(self, shape: tuple[int, ...]) -> Shape:
        """Shape of the output as a map for an input of ``shape``, by running one image."""
        was_training = self.training
        x = self.eval()(next(self.parameters()).new_zeros(1, *shape))
        self.train(was_training)
        return Shape(*self.to_map(x).shape[1:])


class _ChannelsLast(torch.autograd.Function):
    """Channels-last order; the gradient returns in plain order, which is faster for the segment below."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


class LamHead(WrappingHead):
    """A head behind a LAM.

    Args:
        lam: the copies.
        head: reads their output.
        updated: whether the copies follow their blocks.
    """

    lam: Lam

    def __init__(self, lam: Lam, head: Head, updated: bool = True) -> None:
        super().__init__("lam", lam, head, lam.to_map)
        self._updated, self._when = updated, lam.copies.when
        own = dict.fromkeys(block.segment for block in lam.followed)
        self.reads = tuple(dict.fromkeys((*own, *head.reads)))
        self.reads_after = bool(head.reads and head.reads_after) or (updated and lam.copies.when == "after")
        self.may_lag = head.may_lag and lam.may_lag and lam.copies.when == "before"
        self.elementwise = not head.reads or head.elementwise

    def will_lag(self) -> None:
        """The copies and the inner head lag."""
        super().will_lag()
        self.lam.will_lag()

    def read_parameters(self, segments: Sequence[Segment]) -> list[nn.Parameter]:
        """Those of the blocks that copies follow, and the inner head's."""
        followed = self.lam.followed if self._updated else ()
        own = [parameter for block in followed for parameter in block.module(segments).parameters()]
        return own + self.head.read_parameters(segments)

    def before_step(self, segments: Sequence[Segment], taken: Tensor | float) -> None:
        """The copies follow their blocks' weights as they are before the step, if so chosen."""
        super().before_step(segments, taken)
        if self._updated and self._when == "before":
            self.lam.follow(segments, taken)

    def after_step(self, segments: Sequence[Segment], taken: Tensor | float) -> None:
        """The copies follow their blocks' weights as they are after the step, if so chosen."""
        super().after_step(segments, taken)
        if self._updated and self._when == "after":
            self.lam.follow(segments, taken)
