"""Run every segment once and route the gradients of all local units by hand.

Segment outputs are cut from each other, so each segment has a small graph of its own. After a head
has given its cotangent, the cotangent walks down its window through those graphs; a segment's weight
gradient is taken once, for the sum of all its cotangents, after which the graph is freed. Backward is
linear in the cotangent, so this equals running every window again, at a fraction of the cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Self

import torch
from torch import Tensor, nn

from framework.data.batch import Batch, StepOutput
from framework.execution.compilation import compiled
from framework.execution.precision import LossScales, autocast_type
from framework.execution.program import moments
from framework.execution.replay_buffer import Turns
from framework.execution.step import RoutedStep, contrasts
from framework.local.units import Plan, ReadingHead
from framework.network.norm import frozen_statistics
from framework.network.segments import Segment
from framework.runtime.distributed import any_over_ranks
from framework.runtime.errors import UserError


class LocalNetwork(nn.Module):
    """A network that trains with the local units of a plan; to the outside an ordinary module.

    In training mode, ``forward`` computes all losses *and* all gradients and frees activations as it
    goes; ``loss.backward()`` then only hands the gradients over. So it works in a plain loop, under DDP,
    FSDP2 (root wrapped) and DeepSpeed. In evaluation mode or under ``no_grad`` it computes losses only
    and moves no statistics.

    Args:
        backbone: the network without classifier.
        segments: what it was cut into.
        plan: the local units.
        precision: ``"fp32"`` (the parameters' own type), ``"bf16"`` or ``"fp16"`` (autocast).
        channels_last: lay images out so; what follows in the network keeps their layout.
        frozen: segments that run first, in evaluation mode, and stay as they are.
        skip_nonfinite: report losses and gradients that are infinite or NaN as ``overflow``; costs a pass over the
            gradients and one collective a micro-batch. float16 reports them anyway.
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
    ) -> None:
        super().__init__()
        if len(segments) != plan.segments:
            raise UserError(f"the plan is for {plan.segments} segments, the network has {len(segments)}")
        self.backbone, self.segments, self.plan, self.frozen = backbone, tuple(segments), plan, tuple(frozen)
        heads = {unit.head: unit.name for unit in reversed(plan.units)}
        self.heads = nn.ModuleDict({heads[u.head].replace(".", "_"): u.head for u in plan.units})
        self.runners: list[Callable[[Tensor], Tensor]] = list(segments)
        self.moments = moments(plan)
        self.calls = tuple(call for moment in self.moments for call in moment.heads)
        self.low_precision = autocast_type(precision)
        self.layout = torch.channels_last if channels_last else torch.preserve_format
        self.scales = LossScales(self._call_weights()) if precision == "fp16" else None
        rings = plan.asynchronous
        self.turns = (
            Turns(plan.segments, rings.buffer_size, rings.buffer_order)
            if rings.async_mode == "buffer"
            else None
        )
        self.skip_nonfinite = skip_nonfinite
        self._overflowed: Tensor | None = None
        self._between_steps = True
        self._taken: Tensor | float = 1.0

    def train(self, mode: bool = True) -> Self:
        """Training or evaluation mode of everything but the frozen segments."""
        super().train(mode)
        for module in (module for segment in self.frozen for module in segment.modules()):
            module.eval()
        return self

    def forward(self, batch: Batch) -> StepOutput:
        """Losses of all units on a batch; in training mode their gradients too."""
        batch = batch._replace(images=self._laid_out(batch.images))
        if self.training and torch.is_grad_enabled():
            self.begin_step()
            output = self._train(batch)
            self.update_copies(batch, output.overflow)
            return output
        with torch.no_grad(), frozen_statistics(self):
            return self._evaluate(batch)

    def compile_segments(self) -> None:
        """Compile what training steps run of the segments; evaluation stays as it is.

        Raises:
            UserError: a segment can't be compiled.
        """
        self.runners = [compiled(segment) for segment in self.segments]

    def penalty(self) -> Tensor | None:
        """What heads add to the loss for the weights alone (scalar); ``None`` if none does."""
        penalties = [p for head in self._readers() if (p := head.penalty(self.segments)) is not None]
        return torch.stack(penalties).sum() if penalties else None

    def begin_step(self) -> None:
        """Let the copies that follow after a step do so, before the first micro-batch of the next."""
        if self._between_steps:
            self._move_copies("after", self._taken)
        self._between_steps = False

    def update_copies(self, batch: Batch, overflow: Tensor | None = None) -> None:
        """Let the copies in heads follow the segments, if an optimizer step comes next and is not skipped.

        Args:
            batch: the micro-batch just done.
            overflow: bool scalar where steps may be skipped (float16, ``skip_nonfinite``); any in a step's
                micro-batches holds the copies still.
        """
        if overflow is not None:
            self._overflowed = overflow if self._overflowed is None else self._overflowed | overflow
        if not batch.last:
            return
        self._taken = 1.0 if self._overflowed is None else (~self._overflowed).float()
        self._overflowed, self._between_steps = None, True
        self._move_copies("before", self._taken)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Pooled output of the last segment: (N, 3, H, W) -> (N, C) float32 or better."""
        x = self._last_map(images).mean((2, 3))
        return x if x.dtype == torch.float64 else x.float()

    @property
    def classifies(self) -> bool:
        """Whether ``predict`` can be asked: the last head gives logits, which a decoder or a contrast doesn't."""
        head = self.plan.units[-1].head
        return self.plan.supervised and hasattr(head, "predict") and not contrasts(head)

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Logits of the head on the last segment, (N, 3, H, W) -> (N, classes)."""
        head = self.plan.units[-1].head
        with self.autocast(images):
            return head.predict(self._last_map(images))  # type: ignore[operator]

    def autocast(self, x: Tensor) -> AbstractContextManager[object]:
        """The precision in which segments and heads run; weights are cast once a call, so nothing is cached."""
        if self.low_precision is None:
            return nullcontext()
        return torch.autocast(x.device.type, dtype=self.low_precision, cache_enabled=False)

    def _laid_out(self, images: Tensor) -> Tensor:
        return images.to(memory_format=self.layout)

    def _last_map(self, images: Tensor) -> Tensor:
        x = self.entering(self._laid_out(images))
        with self.autocast(x):
            for segment in self.segments:
                x = segment(x)
        return self.segments[-1].to_map(x)

    @torch.no_grad()
    def entering(self, images: Tensor) -> Tensor:
        """The input of the first segment that is not frozen."""
        with self.autocast(images):
            for segment in self.frozen:
                images = segment(images)
        return images

    def _train(self, batch: Batch) -> StepOutput:
        """Losses, attached to all parameters by a node that hands the finished gradients over."""
        step, penalty = self.routed(batch)
        result = _output(self.plan, step.losses, penalty)
        overflow = self._overflow(step, batch.last)
        loss = _HandOver.apply(result.loss, list(step.gradients.values()), *step.gradients)
        return StepOutput(loss, result.unit_losses, overflow)

    def routed(self, batch: Batch) -> tuple[RoutedStep, Tensor | None]:
        """Losses and finished gradients of a batch, and the penalty that is in the gradients."""
        step = RoutedStep(self, batch, scales=self.scales.current() if self.scales is not None else None)
        if self.turns is not None:
            self.turns.take(step)
        else:
            x = self.entering(batch.images)
            for s in range(self.plan.segments):
                x = step.forward(s, x)
                step.run_heads(s)
                step.walk(s)
        penalty = self.penalty()
        if penalty is not None:
            add_gradients(penalty, step.gradients)
        return step, None if penalty is None else penalty.detach()

    def _overflow(self, step: RoutedStep, last: bool) -> Tensor | None:
        """Whether any loss or gradient on any rank is infinite or NaN, where somebody wants to know."""
        if self.scales is not None:
            return self.scales.update(step.take_overflows(), last)
        if not self.skip_nonfinite:
            return None
        seen = [*step.losses.values(), *torch._foreach_norm(list(step.gradients.values()))]
        return any_over_ranks(~torch.isfinite(torch.stack([x.float() for x in seen])).all())

    def _evaluate(self, batch: Batch) -> StepOutput:
        losses: dict[int, Tensor] = {}
        x = self.entering(batch.images)
        with self.autocast(x):
            for segment, moment in zip(self.segments, self.moments, strict=True):
                x = segment(x)
                for call in moment.heads:
                    loss = self.plan.units[call.units[0]].head(segment.to_map(x), batch)
                    losses.update(dict.fromkeys(call.units, loss))
        return _output(self.plan, losses, self.penalty())

    def _move_copies(self, when: str, amount: Tensor | float) -> None:
        for head in self._readers():
            if head.when == when:
                head.update_copies(self.segments, amount)

    def _readers(self) -> list[ReadingHead]:
        return [head for head in self.heads.values() if isinstance(head, ReadingHead)]

    def _call_weights(self) -> list[float]:
        return [max(self.plan.units[i].weight for i in call.units) for call in self.calls]


def add_gradients(penalty: Tensor, gradients: dict[nn.Parameter, Tensor]) -> None:
    """Add the gradient of ``penalty`` to that of every parameter it depends on."""
    found = torch.autograd.grad(penalty, list(gradients), allow_unused=True)
    for parameter, gradient in zip(list(gradients), found, strict=True):
        if gradient is not None:
            gradients[parameter] = gradients[parameter] + gradient


class _HandOver(torch.autograd.Function):
    """The loss as a function of all parameters, whose gradients are known already."""

    @staticmethod
    def forward(ctx, loss: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx, factor: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradients of this step were handed over already: call the network again")
        torch._foreach_mul_(gradients, factor)
        return (None, None, *gradients)


def _output(plan: Plan, losses: dict[int, Tensor], penalty: Tensor | None) -> StepOutput:
    unit_losses = torch.stack([losses[i] for i in range(len(plan.units))])
    weights = unit_losses.new_tensor([unit.weight for unit in plan.units])
    loss = unit_losses @ weights
    return StepOutput(loss if penalty is None else loss + penalty, unit_losses)
