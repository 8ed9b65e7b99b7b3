"""What each pipeline stage does, in which order: a pure function of plan, placement, micro-batches and stage.

Two stages that exchange messages derive the same order of them from it, and all replicas of a stage do the same. A
stage waits for activations from the stage below and for the cotangents of windows that reach into the stages above.
The pipeline is not flushed between steps. With one window over the whole network this is 1F1B.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from framework.execution.program import SegmentProgram
from framework.pipeline.scheduling.placement import Placement


@dataclass(frozen=True)
class Instruction:
    """One thing to do. DeepSpeed's engine calls the method that belongs to its type, with ``kwargs``."""

    @property
    def kwargs(self) -> dict[str, Any]:
        """The fields by name."""
        return dict(vars(self))


@dataclass(frozen=True)
class LoadMicroBatch(Instruction):
    """First stage: take a micro-batch from the loader."""

    micro_batch: int


@dataclass(frozen=True)
class ReceiveActivation(Instruction):
    """The output of the stage below, with the labels and images that heads from here on need."""

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
    """The weights that heads of stage ``reader`` read, as they are before this step."""

    reader: int


@dataclass(frozen=True)
class ReceiveWeights(Instruction):
    """The next version of the weights of stage ``owner`` that heads here read."""

    owner: int


@dataclass(frozen=True)
class ReduceGradients(Instruction):
    """Average the gradients over the replicas of this stage."""


@dataclass(frozen=True)
class OptimizerStep(Instruction):
    """Update this stage's weights."""


@dataclass(frozen=True, eq=False)
class Layout:
    """All that the schedule depends on.

    Attributes:
        programs: what follows the forward of each segment.
        placement: segments of the stages.
        micro_batches: per step.
        reads: pairs (stage, later stage) of which the first has heads that read weights of the second.
        contrast_batch: contrastive heads compare the images of all micro-batches of a step.
        lam_lag: steps by which the weights read may be older than in one process.
    """

    programs: tuple[SegmentProgram, ...]
    placement: Placement
    micro_batches: int
    reads: frozenset[tuple[int, int]] = frozenset()
    contrast_batch: bool = False
    lam_lag: int = 0

    def hops(self, stage: int) -> list[tuple[int, int]]:
        """Backward passes that come down into ``stage``, in order: (stages above, segment that they start from)."""
        top = self.placement.span(stage).stop
        return [
            (self.placement.stage_of(s) - stage, s)
            for s in range(top, len(self.programs))
            if self.programs[s].crossing(top)
        ]

    def reach(self, stage: int) -> int:
        """Distance, in stages, of the farthest stage whose cotangents come down here; so many micro-batches wait."""
        return max((distance for distance, _ in self.hops(stage)), default=0)


def step_instructions(layout: Layout, stage: int, step: int) -> Iterator[Instruction]:
    """What a stage does in step ``step``, counted from the last drain.

    The backward passes that start ``d`` stages above come after the forward passes of ``d`` more micro-batches, as in
    1F1B. So at most ``reach + 1`` micro-batches have graphs here.
    """
    yield from (SendWeights(reader) for reader, owner in sorted(layout.reads) if owner == stage)
    if step > layout.lam_lag:
        yield from _receive_weights(layout, stage)
    yield from _whole_batch(layout, stage) if layout.contrast_batch else _one_by_one(layout, stage)
    yield ReduceGradients()
    yield OptimizerStep()


def drain_instructions(layout: Layout, stage: int, steps: int) -> Iterator[Instruction]:
    """Receive the messages that ``steps`` steps have left in flight."""
    for _ in range(min(steps, layout.lam_lag + 1)):
        yield from _receive_weights(layout, stage)


def all_instructions(layout: Layout, stage: int, steps: int) -> Iterator[Instruction]:
    """All that a stage does from one drain to the next."""
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
    """Heads and backward passes come right after each segment, so that its activations are freed as early as can be."""
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
