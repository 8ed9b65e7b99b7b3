"""What a rank does at each instruction of its stage's schedule, but for reducing and stepping."""

from __future__ import annotations

from collections import deque
from datetime import timedelta

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipelineParallelGrid
from torch import Tensor, nn

from framework.data.batch import Batch
from framework.execution import LocalNetwork
from framework.execution.masks import Masks
from framework.execution.noise import Noise
from framework.execution.step import RoutedStep
from framework.execution.step_output import add_gradients
from framework.execution.teacher import TeacherPass
from framework.local import Need
from framework.pipeline.rank.p2p import Peer, Receiver, Sender
from framework.pipeline.scheduling.schedule import Layout
from framework.pipeline.scheduling.simulation import AHEAD
from framework.pipeline.scheduling.weight_readers import WeightReaders
from framework.runtime import distributed


class StageWorker:
    """A stage's micro-batches and its messages. The methods named like instructions carry them out.

    Args:
        net: the whole network, of which this rank trains a stage.
        layout: of the pipeline.
        readers: heads that read weights.
        grid: which stage and replica this rank is.
        timeout: seconds to wait for another stage.

    Attributes:
        micro_batches: of the current step; first stage only.
        groups: process groups of the messages, one for each direction.
        unit_losses: (U,) sum over the step's micro-batches, 0 for units of other stages.
        overflow: see ``StepResult``, of the last step.
        hopeless: likewise.
    """

    def __init__(
        self,
        net: LocalNetwork,
        layout: Layout,
        readers: WeightReaders,
        grid: PipelineParallelGrid,
        timeout: float,
    ) -> None:
        self.net, self.layout, self.readers = net, layout, readers
        self.stage: int = grid.get_stage_id()
        self.span = layout.placement.span(self.stage)
        self.replicas: dist.ProcessGroup = grid.get_data_parallel_group()
        self._grid, self._timeout = grid, timeout
        self._images_here = any(_needs_images(net, s) for s in range(self.span.start, len(net.segments)))
        self._images_above = any(_needs_images(net, s) for s in range(self.span.stop, len(net.segments)))
        # Of steps whose weights of other stages have not arrived yet: whether they were made.
        self._taken: deque[Tensor | float] = deque()
        self._x = torch.empty(0)  # output of the segment run last
        self.overflow: Tensor | None = None
        self.hopeless: Tensor | None = None
        self._noise: Noise | None = None
        self._masks: Masks | None = None
        for head in readers.remote[self.stage]:
            head.will_lag()
        self._connect()
        self._reset([])

    def begin_step(self, micro_batches: list[Batch]) -> None:
        """Call ``after_step`` of heads that read this stage's weights, and drop what belongs to the step before."""
        if self.net.teacher is not None:
            self.net.teacher.after_step(self.net.segments, self.span)
        for head in self.readers.local[self.stage]:
            head.after_step(self.net.segments, self.net.taken)
        self._noise = Noise.next(self.net.plan.noise, self._noise)
        self._masks = Masks.next(self.net.plan.masking, self._masks)
        self._reset(micro_batches)

    def _reset(self, micro_batches: list[Batch]) -> None:
        self.micro_batches = micro_batches
        self.unit_losses = next(self.net.parameters()).new_zeros(len(self.net.plan.units))
        self._scales = self.net.scales.current() if self.net.scales is not None else None
        self._live: dict[int, RoutedStep] = {}
        self._overflows: Tensor | None = None

    def load(self, micro_batch: int) -> None:
        """First stage: take a micro-batch of ``begin_step``."""
        batch = self.micro_batches[micro_batch]
        batch = batch._replace(images=batch.images.to(memory_format=self.net.layout))
        with distributed.replicas(self.replicas):
            teacher = self.net.teacher_pass(batch)
        self._begin(micro_batch, batch, self.net.first_input(batch), teacher)

    def receive_activation(self, micro_batch: int) -> None:
        """The output of the stage below, with the labels, images and teacher's output that heads from here on need."""
        assert self._from_below is not None
        x, *others = self._from_below.receive()
        labels = others.pop(0) if self.net.plan.supervised else None
        images = others.pop(0) if self._images_here else x.new_empty(0)
        teacher = TeacherPass(self.net.teacher, *others) if self.net.teacher is not None and others else None
        self._begin(micro_batch, Batch(images, labels, self.net.plan.views), x, teacher)

    def send_activation(self, micro_batch: int) -> None:
        """The same to the stage above."""
        assert self._to_above is not None
        batch, teacher = self._live[micro_batch].batch, self._live[micro_batch].teacher
        labels = [batch.labels] if self.net.plan.supervised and batch.labels is not None else []
        images = [batch.images] if self._images_above else []
        self._to_above.send([self._x, *labels, *images, *(teacher.state() if teacher is not None else [])])
        self._live[micro_batch].teacher = None

    def forward(self, micro_batch: int, segment: int) -> None:
        """Run a segment."""
        with distributed.replicas(self.replicas):
            self._x = self._live[micro_batch].forward(segment, self._x)

    def heads(self, micro_batch: int, segment: int) -> None:
        """Run the heads on a segment: losses and their gradients; embeddings only, where a contrast is deferred."""
        step = self._live[micro_batch]
        with distributed.replicas(self.replicas):
            step.run_heads(segment, defer_contrast=self.layout.contrast_batch)
        self._collect(step)

    def contrast(self) -> None:
        """Losses of contrastive heads over all micro-batches of the step."""
        steps = list(self._live.values())
        for segment in self.span:
            with distributed.replicas(self.replicas):
                RoutedStep.contrast(steps, segment)
            for step in steps:
                self._collect(step)

    def receive_cotangents(self, micro_batch: int, after: int) -> None:
        """From the stage above, of the backward passes that follow the forward of segment ``after``."""
        assert self._from_above is not None
        routes = self.net.program.segment_programs[after].crossing(self.span.stop)
        self._live[micro_batch].receive(after, [self._from_above.receive()[0] for _ in routes])

    def walk(self, micro_batch: int, after: int) -> None:
        """This stage's part of those backward passes."""
        step = self._live[micro_batch]
        with distributed.replicas(self.replicas):
            step.walk(after)
        self._collect(step)

    def send_cotangents(self, micro_batch: int, after: int) -> None:
        """To the stage below, one message for each route."""
        assert self._to_below is not None
        outgoing = self._live[micro_batch].outgoing
        for route in self.net.program.segment_programs[after].crossing(self.span.start):
            self._to_below.send([outgoing.pop(route).value])

    def send_weights(self, reader: int) -> None:
        """All weights of this stage that heads of stage ``reader`` read, as one flat tensor."""
        weights = self.readers.weights(reader, self.stage)
        self._to_readers[reader].send([torch.cat([p.detach().reshape(-1) for p in weights])])

    def receive_weights(self, owner: int) -> None:
        """The next version of the weights of stage ``owner`` that heads here read.

        When those of the last owner are there, the heads' ``before_step`` of that version is called.
        """
        (flat,) = self._from_owners[owner].receive()
        weights = self.readers.weights(self.stage, owner)
        with torch.no_grad():
            for weight, values in zip(weights, flat.split([w.numel() for w in weights]), strict=True):
                weight.copy_(values.view_as(weight))
        if owner == max(self._from_owners):
            taken = self._taken.popleft()
            for head in self.readers.remote[self.stage]:
                head.before_step(self.net.segments, taken)

    def finish_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Add the gradients of the heads' penalties, once a step."""
        penalties = [
            p for head in self.readers.local[self.stage] if (p := head.penalty(self.net.segments)) is not None
        ]
        if not penalties:
            return
        gradients = {p: p.grad for p in parameters if p.grad is not None}
        add_gradients(torch.stack(penalties).sum(), gradients)
        for parameter, gradient in gradients.items():
            parameter.grad = gradient

    def finish_step(self) -> None:
        """Move the loss scales and call the heads' ``before_step``.

        In float16 the device waits for all stages: an overflow on one skips the step on all.
        """
        self.net.taken = 1.0
        if self.net.scales is not None:
            assert self._overflows is not None
            self.overflow, hopeless = self.net.scales.update(self._overflows)
            self.hopeless = self.net.program.by_unit(hopeless)
            self.net.taken = (~self.overflow).float()
        if self.net.teacher is not None:
            self.net.teacher.before_step(self.net.taken)
        for head in self.readers.local[self.stage]:
            head.before_step(self.net.segments, self.net.taken)
        if self._from_owners:
            self._taken.append(self.net.taken)

    def flush(self) -> None:
        """Wait until every message sent has been received."""
        for sender in (self._to_above, self._to_below, *self._to_readers.values()):
            if sender is not None:
                sender.flush()

    def _connect(self) -> None:
        timeout = self._timeout
        down, up, weights = self.groups = [
            distributed.new_group(timeout=timedelta(seconds=timeout)) for _ in range(3)
        ]
        below, above = self._peer(self.stage - 1), self._peer(self.stage + 1)
        self._from_below = Receiver(down, below, timeout) if below else None
        self._to_below = Sender(up, below, timeout) if below else None
        self._from_above = Receiver(up, above, timeout) if above else None
        self._to_above = Sender(down, above, timeout, AHEAD) if above else None
        self._to_readers: dict[int, Sender] = {}
        self._from_owners: dict[int, Receiver] = {}
        for reader, owner in sorted(self.layout.reads):
            if self.stage == owner and (peer := self._peer(reader)):
                self._to_readers[reader] = Sender(weights, peer, timeout)
            if self.stage == reader and (peer := self._peer(owner)):
                self._from_owners[owner] = Receiver(weights, peer, timeout)

    def _peer(self, stage: int) -> Peer | None:
        stages = self.layout.placement.stages
        if not 0 <= stage < stages:
            return None
        rank = self._grid.stage_to_global(stage)
        return Peer(rank, f"rank {rank} (stage {stage} of 0..{stages - 1})")

    def _begin(self, micro_batch: int, batch: Batch, x: Tensor, teacher: TeacherPass | None) -> None:
        noise = self._noise.of(micro_batch) if self._noise is not None else None
        if self._masks is not None:
            with distributed.replicas(self.replicas):
                batch = self._masks.of(micro_batch).on(batch)
        self._live[micro_batch] = RoutedStep(self.net.program, batch, self.span, self._scales, teacher, noise)
        self._x = x

    def _collect(self, step: RoutedStep) -> None:
        """Move finished gradients and losses of a micro-batch into the parameters' gradients and the step's losses."""
        gradients, step.gradients = step.gradients, {}
        if gradients:
            torch._foreach_mul_(list(gradients.values()), 1 / self.layout.micro_batches)
        for parameter, gradient in gradients.items():
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        for unit, loss in step.losses.items():
            self.unit_losses[unit] += loss
        step.losses = {}
        if step.scales is not None:
            flags = step.take_overflows()
            self._overflows = flags if self._overflows is None else self._overflows | flags


def _needs_images(net: LocalNetwork, segment: int) -> bool:
    return any(Need.IMAGES in unit.head.needs for unit in net.plan.units if unit.last == segment)
