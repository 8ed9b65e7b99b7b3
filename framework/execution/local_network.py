"""A network that trains with local losses: every segment runs once, gradients are routed by hand.

Segment outputs are detached from each other, so each segment has a small graph of its own. The cotangent that a head
gives is passed down through the graphs of its window; a segment's weight gradient is taken once, for the sum of all
its cotangents, after which the graph is freed. Backward is linear in the cotangent, so this equals running every
window again, at a fraction of the cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from framework.data.batch import Batch
from framework.execution.compilation import compiled
from framework.execution.evaluation import evaluated_losses
from framework.execution.hooks import Exchange, Finishing, StepHooks
from framework.execution.masks import Masks
from framework.execution.noise import Noise
from framework.execution.precision import LossScales
from framework.execution.program import Program
from framework.execution.replay_buffer import ReplayBufferStrategy
from framework.execution.segment_graph import check_repeatable
from framework.execution.step import RoutedStep
from framework.execution.step_output import (
    StepOutput,
    add_gradients,
    any_nonfinite,
    gradients_of,
    handed_over,
    step_output,
)
from framework.execution.teacher import Teacher, TeacherPass
from framework.execution.uses import Use, Uses
from framework.execution.weight_average import WeightAverage
from framework.local.units import Plan
from framework.network import pooling
from framework.network.feedback import use_feedback
from framework.network.norm import frozen_statistics
from framework.network.segments import Segment
from framework.network.sharded_init import Made
from framework.runtime.errors import UserError

LOSS_SCALES = "scales."  # how names of float16's loss scales begin, in a network's state


class LocalNetwork(nn.Module):
    """A network that trains with the local units of a plan; to the outside an ordinary module.

    In training mode, ``forward`` computes all losses *and* all gradients and frees activations as it
    goes; ``loss.backward()`` then only hands the gradients over. So it works in a plain loop, under DDP and
    DeepSpeed. In evaluation mode or under ``no_grad`` it computes losses only
    and moves no statistics.

    Args:
        backbone: the network without classifier.
        segments: what it was cut into.
        plan: the local units.
        precision: ``"fp32"`` (the parameters' own type), ``"bf16"`` or ``"fp16"`` (autocast).
        channels_last: convert images to this memory format; the network's layers keep it.
        frozen: segments that run first, in evaluation mode, and do not learn.
        skip_nonfinite: report losses and gradients that are infinite or NaN as ``overflow``; costs a pass over the
            gradients and one collective a micro-batch. float16 reports them anyway.
        recompute: activations that are not kept but computed again, "segment" by segment or "block" by block; see
            ``recomputation``.

    Attributes:
        program: what a step does.
        teacher: its moving average, of plans that want one.
        average: moving average of the weights for evaluation, where one was asked for (``keep_average``).
        made: has the values of tensors that have no memory yet, in a network that was built in slices; the engine that
            cuts it takes them from there.
        noise: of the micro-batch at hand, of plans that want some.
        masks: likewise.
        scales: loss scales, of float16.
        taken: 1, or 0 where the optimizer step before was skipped, as heads are told; a run that goes on from a
            checkpoint sets it.

    Raises:
        UserError: the plan is for another number of segments, there is no such precision or ``recompute``, or
            a module can't be run again.
    """

    def __init__(
        self,
        backbone: nn.Module,
        segments: Sequence[Segment],
        plan: Plan,
        precision: str = "fp32",
        channels_last: bool = False,
        frozen: Sequence[Segment] = (),
        skip_nonfinite: bool = False,
        recompute: str = "none",
    ) -> None:
        super().__init__()
        if len(segments) != plan.segments:
            raise UserError(f"the plan is for {plan.segments} segments, the network has {len(segments)}")
        if plan.feedback != "exact":
            for module in (backbone, *plan.heads):
                use_feedback(module, plan.feedback)
        self.backbone, self.frozen = backbone, tuple(frozen)
        self.program = Program.of(plan, segments, precision, recompute)
        check_repeatable(segments[s] for s in self.program.recomputation.segments)
        names = {unit.head: unit.name.replace(".", "_") for unit in reversed(plan.units)}
        self.heads = nn.ModuleDict({names[head]: head for head in plan.heads})
        self.teacher = Teacher(backbone, segments, plan, names) if plan.teacher is not None else None
        self.average: WeightAverage | None = None
        self.made: Made | None = None
        self.layout = torch.channels_last if channels_last else torch.preserve_format
        self.weights: Tensor
        weights = torch.tensor([unit.weight for unit in plan.units], dtype=torch.float64)
        self.register_buffer("weights", weights, persistent=False)
        of_calls = [self.program.weight(call) for call in self.program.calls]
        self.scales = LossScales(of_calls) if precision == "fp16" else None
        replays = plan.execution.kind == "replay buffer"
        # "turns" is part of names in checkpoints.
        self.turns = ReplayBufferStrategy(plan.segments, plan.execution) if replays else None
        self.skip_nonfinite = skip_nonfinite and self.scales is None  # float16 looks for overflows anyway
        self._overflowed: Tensor | None = None
        self._between_steps = True
        self.taken: Tensor | float = 1.0
        self.noise: Noise | None = None
        self.masks: Masks | None = None
        self._exchange: Exchange | None = None

    def attach(self, hooks: StepHooks) -> Finishing:
        """From now on training steps give their gradients to ``hooks``, and ``loss.backward()`` has none.

        Returns:
            When they will be finished.

        Raises:
            UserError: a head needs whole weights between steps, and the engine has none.
        """
        for unit in self.plan.units if hooks.in_slices else ():
            if unit.head.reads and not unit.head.elementwise:
                raise UserError(
                    f"the head of unit {unit.name} looks at weights of other segments, of which this engine has "
                    f"slices: use another engine, or set elementwise=True in {type(unit.head).__name__} if what it "
                    "does treats every element on its own"
                )
        last = self.teacher.last if self.teacher is not None else -1
        self._exchange = Exchange(hooks, self.program, last)
        return self._exchange.finishing

    def detach(self) -> None:
        """The end of ``attach``."""
        self._exchange = None

    def uses(self) -> Uses:
        """When its steps use which weights."""
        return Uses.of(self.program, self.frozen, self.teacher)

    def lent(self, use: Use) -> AbstractContextManager[None]:
        """Inside, which is in no training step, the weights of a use are there, under every engine; collective."""
        return nullcontext() if self._exchange is None else self._exchange.hooks.lent(use)

    @property
    def plan(self) -> Plan:
        """The local units."""
        return self.program.plan

    @property
    def segments(self) -> tuple[Segment, ...]:
        """What the backbone was cut into, without the frozen ones."""
        return self.program.segments

    def train(self, mode: bool = True) -> Self:
        """Training or evaluation mode of everything but the frozen segments."""
        super().train(mode)
        for module in (module for segment in self.frozen for module in segment.modules()):
            module.eval()
        return self

    def forward(self, batch: Batch) -> StepOutput:
        """Losses of all units on a batch; in training mode their gradients too.

        Raises:
            UserError: the number of images is no multiple of the views; there are fewer views than the plan has.
        """
        if len(batch.images) % batch.views:
            raise UserError(
                f"{len(batch.images)} images: must be a multiple of the batch's {batch.views} views"
            )
        if batch.views < self.plan.views:
            raise UserError(
                f"a batch with {batch.views} view of every image: the plan has {self.plan.views}; Batch(images, "
                f"views={self.plan.views}) takes the first view of all images, then the second"
            )
        batch = batch._replace(images=batch.images.to(memory_format=self.layout))
        if self.training and torch.is_grad_enabled():
            self.start_micro_batch()
            output = self._train(batch)
            self.end_micro_batch(batch, output.overflow)
            return output
        with torch.no_grad(), frozen_statistics(self):
            x, teacher = self.first_input(batch), self.teacher_pass(batch)
            return step_output(
                self.weights,
                evaluated_losses(self.program, x, batch, teacher, self.lent),
                self._whole_penalty(self.penalty()),
            )

    def compile_segments(self) -> None:
        """Compile what training steps run of the segments; evaluation stays as it is.

        Raises:
            UserError: a segment can't be compiled, or is to be run again, for which dropout would be drawn anew.
        """
        if self.program.recomputation.segments:
            raise UserError("execution.compile=true: can't be combined with execution.recompute")
        self.program = replace(self.program, runners=tuple(compiled(segment) for segment in self.segments))

    def keep_average(self, decay: float) -> None:
        """Have an average of what evaluation runs in the state from now on; call ``average.update`` after each step."""
        last = next(name for name, head in self.heads.items() if head is self.plan.units[-1].head)
        self.average = WeightAverage(self, ["backbone", *[f"heads.{last}"] * self.classifies], decay)

    def penalty(self) -> Tensor | None:
        """Sum of the heads' penalties (scalar); ``None`` if there are none."""
        penalties = [p for head in self.plan.heads if (p := head.penalty(self.segments)) is not None]
        return torch.stack(penalties).sum() if penalties else None

    def start_micro_batch(self) -> None:
        """Call the heads' ``after_step`` if this is the first micro-batch after an optimizer step, or of all."""
        self.noise = self.noise.of(self.noise.micro_batch + 1) if self.noise is not None else None
        self.masks = self.masks.of(self.masks.micro_batch + 1) if self.masks is not None else None
        if self._between_steps:
            if self._exchange is not None:
                self._exchange.before_step()
            self.noise = Noise.next(self.plan.noise, self.noise)
            self.masks = Masks.next(self.plan.masking, self.masks)
            if self.teacher is not None:
                self.teacher.after_step(self.segments)
            for head in self.plan.heads:
                head.after_step(self.segments, self.taken)
        self._between_steps = False

    def end_micro_batch(self, batch: Batch, overflow: Tensor | None = None) -> None:
        """Call the heads' ``before_step`` if an optimizer step comes next.

        Args:
            batch: the micro-batch just done.
            overflow: bool scalar where steps may be skipped (float16, ``skip_nonfinite``). One overflow in a step's
                micro-batches skips the step.
        """
        if overflow is not None:
            self._overflowed = overflow if self._overflowed is None else self._overflowed | overflow
        if not batch.last:
            return
        self.taken = 1.0 if self._overflowed is None else (~self._overflowed).float()
        self._overflowed, self._between_steps = None, True
        if self.teacher is not None:
            self.teacher.before_step(self.taken)
        for head in self.plan.heads:
            head.before_step(self.segments, self.taken)

    def constant_rate(self) -> list[nn.Parameter]:
        """The heads' parameters that no schedule of the learning rate concerns."""
        return [parameter for head in self.plan.heads for parameter in head.constant_rate()]

    def clear_replay_buffers(self) -> None:
        """Drop the batches in replay buffers, which a checkpoint does not contain."""
        if self.turns is not None:
            self.turns.clear()

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Pooled output of the last segment, as the network pools it: (N, 3, H, W) -> (N, D) float32 or better."""
        x = self._last_output(images)
        with self.autocast(x), self.lent(Use("heads", self.plan.segments - 1)):
            x = pooling.features(self.segments[-1], x)
        return x if x.dtype == torch.float64 else x.float()

    @property
    def in_slices(self) -> bool:
        """Whether an engine has cut the weights into slices, so that all ranks must evaluate as many batches."""
        return self._exchange is not None and self._exchange.hooks.in_slices

    def accompany(self) -> None:
        """Take part in the exchanges of other ranks' ``features`` or ``predict``, without images."""
        uses = [Use("frozen", i) for i in range(len(self.frozen))]
        uses += [Use("forward", s) for s in range(self.plan.segments)]
        for use in (*uses, Use("heads", self.plan.segments - 1)):
            with self.lent(use):
                pass

    @property
    def classifies(self) -> bool:
        """Whether the last head gives logits, which ``predict`` asks for."""
        return self.plan.units[-1].head.classifies

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Logits of the last unit's head, (N, 3, H, W) -> (N, classes)."""
        head = self.plan.units[-1].head
        x = self._last_output(images)
        with self.autocast(images), self.lent(Use("heads", self.plan.segments - 1)):
            return head.predict(head.seen(self.segments[-1], x))

    def autocast(self, x: Tensor) -> AbstractContextManager[object]:
        """The precision in which segments and heads run."""
        return self.program.autocast(x)

    @torch.no_grad()
    def run_frozen(self, images: Tensor) -> Tensor:
        """The input of the first segment that is not frozen."""
        with self.autocast(images):
            for i, segment in enumerate(self.frozen):
                with self.lent(Use("frozen", i)):
                    images = segment(images)
        return images

    def first_input(self, batch: Batch) -> Tensor:
        """What goes into the first segment that is not frozen: all of the images, or one view of each."""
        one_of_several = self.plan.student_views < batch.views
        return self.run_frozen(batch.images.chunk(batch.views)[0] if one_of_several else batch.images)

    def masked(self, batch: Batch) -> Batch:
        """The batch with the micro-batch's masks, of plans that want some; collective."""
        return batch if self.masks is None else self.masks.on(batch)

    def teacher_pass(self, batch: Batch) -> TeacherPass | None:
        """The teacher's forward pass over a batch, where there is a teacher."""
        return self.teacher.start(batch) if self.teacher is not None else None

    def routed_step(self, batch: Batch) -> tuple[RoutedStep, Tensor | None]:
        """A batch's losses and finished gradients, and the penalty, whose gradient is added to them.

        Of a network with hooks those have the gradients.
        """
        batch = self.masked(batch)
        early = self._exchange.early(self.skip_nonfinite) if self._exchange is not None else None
        step = RoutedStep(
            self.program,
            batch,
            scales=self.scales.current() if self.scales is not None else None,
            teacher=self.teacher_pass(batch),
            noise=self.noise,
            early=early,
        )
        if self.turns is not None:
            self.turns.run(step)
        elif self.program.top_first:
            x = self.first_input(batch)
            for s in range(self.plan.segments):
                x = step.forward(s, x)
            for s in reversed(range(self.plan.segments)):
                step.run_heads(s)
                step.walk(s)
        else:
            x = self.first_input(batch)
            for s in range(self.plan.segments):
                x = step.forward(s, x)
                step.run_heads(s)
                step.walk(s)
        penalty = self.penalty()
        if penalty is not None and self._exchange is not None and self._exchange.hooks.in_slices:
            self._exchange.hooks.penalized(gradients_of(penalty, self.parameters()))
        elif penalty is not None:
            add_gradients(penalty, step.gradients)
            if early is not None:
                early.added(list(step.gradients))
                step.release()
        return step, self._whole_penalty(penalty)

    def _whole_penalty(self, penalty: Tensor | None) -> Tensor | None:
        if penalty is None or self._exchange is None:
            return None if penalty is None else penalty.detach()
        return self._exchange.hooks.total(penalty.detach())

    def _last_output(self, images: Tensor) -> Tensor:
        x = self.run_frozen(images.to(memory_format=self.layout))
        with self.autocast(x):
            for s, segment in enumerate(self.segments):
                with self.lent(Use("forward", s)):
                    x = segment(x)
        return x

    def _train(self, batch: Batch) -> StepOutput:
        """Losses, attached to all parameters by a node that hands the finished gradients over."""
        step, penalty = self.routed_step(batch)
        result = step_output(self.weights, step.losses, penalty)
        early, nonfinite = step.early, None
        if self.skip_nonfinite:
            norms = early.norms if early is not None else torch._foreach_norm([*step.gradients.values()])
            nonfinite = any_nonfinite(step.losses, norms)
        loss = result.loss if self._exchange is not None else handed_over(result.loss, step.gradients)
        if self.scales is not None:
            overflow, hopeless = self.scales.update(step.take_overflows(), batch.last)
            return StepOutput(loss, result.unit_losses, overflow, self.program.by_unit(hopeless))
        return StepOutput(loss, result.unit_losses, nonfinite)
