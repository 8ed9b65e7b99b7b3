"""What each pipeline stage does, in which order: a pure function of plan, placement, micro-batches and stage.

Both sides of an edge derive the same order of messages from it, and so do all replicas of a stage. A stage
waits for activations from below and for the cotangents of windows that span its upper edge; steps follow one
another without a flush. With one window over everything this is 1F1B.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from framework.execution.program import SegmentProgram
from framework.pipeline.scheduling.placement import Placement


@dataclass(frozen=True)
class Instruction:
    """One thing to do; DeepSpeed's engine calls the method that its type maps to with ``kwargs``."""

    @property
    def kwargs(self) -> dict[str, Any]:
        """The fields by name."""
        return dict(vars(self))


@dataclass(frozen=True)
class LoadMicroBatch(Instruction):
    """The first stage takes a micro-batch from the loader."""

    micro_batch: int


@dataclass(frozen=True)
class ReceiveActivation(Instruction):
    """The output of the stage below, with what heads further up need of the batch."""

    micro_batch: int


@dataclass(frozen=True)
class SendActivation(Instruction):
    """The same to the stage above."""

    micro_batch: int


@dataclass(frozen=True)
class Forward(Instruction):
    """Run a segment."""

    micro_batch: int
    segment: int


@dataclass(frozen=True)
class Heads(Instruction):
    """Run the heads on a segment; under ``contrast=batch`` contrastive ones up to their embeddings."""

    micro_batch: int
    segment: int


@dataclass(frozen=True)
class Contrast(Instruction):
    """Score the embeddings of all micro-batches together."""


@dataclass(frozen=True)
class ReceiveCotangents(Instruction):
    """From the stage above: of the backward passes that follow the forward of segment ``after`` there."""

    micro_batch: int
    after: int


@dataclass(frozen=True)
class Walk(Instruction):
    """This stage's part of the backward passes that follow the forward of segment ``after``."""

    micro_batch: int
    after: int


@dataclass(frozen=True)
class SendCotangents(Instruction):
    """To the stage below."""

    micro_batch: int
    after: int


@dataclass(frozen=True)
class SendWeights(Instruction):
    """The weights that heads of stage ``reader`` follow, as they are before this step."""

    reader: int


@dataclass(frozen=True)
class ReceiveWeights(Instruction):
    """The next version of the weights that heads here follow."""

    owner: int


@dataclass(frozen=True)
class ReduceGradients(Instruction):
    """Average over the replicas of this stage."""


@dataclass(frozen=True)
class OptimizerStep(Instruction):
    """Change this stage's weights."""


@dataclass(frozen=True, eq=False)
class Layout:
    """All that the schedule depends on.

    Attributes:
        programs: what follows the forward of each segment.
        placement: segments of the stages.
        micro_batches: per step.
        reads: pairs (stage, later stage) of which the first has heads that follow weights of the second.
        contrast_batch: contrastive heads see all micro-batches at once.
        lam_lag: steps by which followed weights may come later than at no loss.
    """

    programs: tuple[SegmentProgram, ...]
    placement: Placement
    micro_batches: int
    reads: frozenset[tuple[int, int]] = frozenset()
    contrast_batch: bool = False
    lam_lag: int = 0

    def hops(self, stage: int) -> list[tuple[int, int]]:
        """(stages above, segment) of the walks that come down into ``stage``, in order."""
        top = self.placement.span(stage).stop
        return [
            (self.placement.stage_of(s) - stage, s)
            for s in range(top, len(self.programs))
            if self.programs[s].crossing(top)
        ]

    def reach(self, stage: int) -> int:
        """Stages above until the last of which cotangents come down, which is also how far it runs ahead of them."""
        return max((distance for distance, _ in self.hops(stage)), default=0)


def step_instructions(layout: Layout, stage: int, step: int) -> Iterator[Instruction]:
    """Step ``step`` of a stage, counted from the last drain.

    The walk from a stage ``d`` edges above comes after the forward of ``d`` more micro-batches, as in 1F1B,
    so that at most ``reach + 1`` micro-batches have graphs here.
    """
    yield from (SendWeights(reader) for reader, owner in sorted(layout.reads) if owner == stage)
    if step > layout.lam_lag:
        yield from _receive_weights(layout, stage)
    yield from _whole_batch(layout, stage) if layout.contrast_batch else _one_by_one(layout, stage)
    yield ReduceGradients()
    yield OptimizerStep()


def drain_instructions(layout: Layout, stage: int, steps: int) -> Iterator[Instruction]:
    """What is still under way after ``steps`` steps."""
    for _ in range(min(steps, layout.lam_lag + 1)):
        yield from _receive_weights(layout, stage)


def all_instructions(layout: Layout, stage: int, steps: int) -> Iterator[Instruction]:
    """Everything from one drain to the next."""
    for step in range(steps):
        yield from step_instructions(layout, stage, step)
    yield from drain_instructions(layout, stage, steps)


def _one_by_one(layout: Layout, stage: int) -> Iterator[Instruction]:
    hops = layout.hops(stage)
    for turn in range(layout.micro_batches + layout.reach(stage)):
        if turn < layout.micro_batches:
            yield from _forward(layout, stage, turn)
        for distance, after in hops:
            if 0 <= turn - distance < layout.micro_batches:
                yield from _walk_from_above(layout, stage, turn - distance, after)


def _whole_batch(layout: Layout, stage: int) -> Iterator[Instruction]:
    for micro_batch in range(layout.micro_batches):
        yield from _forward(layout, stage, micro_batch)
    yield Contrast()
    for micro_batch in range(layout.micro_batches):
        for segment in layout.placement.span(stage):
            yield from _walk(layout, stage, micro_batch, segment)
    hops = layout.hops(stage)
    for distance in sorted({distance for distance, _ in hops}):
        for micro_batch in range(layout.micro_batches):
            for after in (after for other, after in hops if other == distance):
                yield from _walk_from_above(layout, stage, micro_batch, after)


def _forward(layout: Layout, stage: int, micro_batch: int) -> Iterator[Instruction]:
    """Each segment is followed by its heads and walk, so that its activations live as long as a window needs them."""
    span = layout.placement.span(stage)
    yield LoadMicroBatch(micro_batch) if stage == 0 else ReceiveActivation(micro_batch)
    for segment in span:
        yield Forward(micro_batch, segment)
        if segment == span[-1] and stage < layout.placement.stages - 1:
            yield SendActivation(micro_batch)
        if layout.programs[segment].heads:
            yield Heads(micro_batch, segment)
        if not layout.contrast_batch:
            yield from _walk(layout, stage, micro_batch, segment)


def _walk_from_above(layout: Layout, stage: int, micro_batch: int, after: int) -> Iterator[Instruction]:
    yield ReceiveCotangents(micro_batch, after)
    yield from _walk(layout, stage, micro_batch, after)


def _walk(layout: Layout, stage: int, micro_batch: int, after: int) -> Iterator[Instruction]:
    span = layout.placement.span(stage)
    if any(step.segment in span for step in layout.programs[after].walk):
        yield Walk(micro_batch, after)
    if stage > 0 and layout.programs[after].crossing(span.start):
        yield SendCotangents(micro_batch, after)


def _receive_weights(layout: Layout, stage: int) -> Iterator[Instruction]:
    yield from (ReceiveWeights(owner) for reader, owner in sorted(layout.reads) if reader == stage)
