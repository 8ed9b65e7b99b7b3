"""One micro-batch through the segments of one process: all of them, or a pipeline stage's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial, reduce

import torch
from torch import Tensor, nn

from framework.data.batch import Batch
from framework.execution.hooks import EarlyGradients
from framework.execution.masks import visible_tokens
from framework.execution.noise import Noise
from framework.execution.precision import Scale, smaller, summed, unscale_
from framework.execution.program import GradientRoute, HeadCall, InputGradient, Program, WeightGradient
from framework.execution.segment_graph import Run, SegmentGraph
from framework.execution.teacher import TeacherPass
from framework.execution.uses import Use
from framework.local.head import Head
from framework.local.masking import Masking


class Cotangent:
    """Gradient at a segment's output, ``scale`` times the true one."""

    def __init__(self, value: Tensor, scale: Scale) -> None:
        self.value, self.scale = value, scale

    def plus(self, other: Cotangent | None) -> Cotangent:
        """The sum, in the smaller of the two scales."""
        if other is None:
            return self
        return Cotangent(*summed(self.value, self.scale, other.value, other.scale))


class RoutedStep:
    """A forward pass whose gradients are routed by hand: the graphs, cotangents and gradients of a micro-batch.

    For every segment in order: ``forward``, ``run_heads``, ``walk``.

    Args:
        program: what to do.
        batch: the micro-batch; heads see its labels and images. What its masks hide is dropped behind segment 0.
        span: segments of this process. Cotangents for the segment below it end up in ``outgoing``, those from the
            segment above it are handed to ``receive``.
        scales: the loss scale of every head call, scalars on the device (float16 only).
        teacher: runs beside the segments.
        noise: on their outputs.
        early: takes gradients as soon as they are finished, and is told which weights come next.

    Attributes:
        losses: by number of the unit, unweighted and detached.
        gradients: by parameter; those that ``early`` took are gone.
        outgoing: cotangents for the segment below the span, by route.
    """

    def __init__(
        self,
        program: Program,
        batch: Batch,
        span: range | None = None,
        scales: Sequence[Tensor] | None = None,
        teacher: TeacherPass | None = None,
        noise: Noise | None = None,
        early: EarlyGradients | None = None,
    ) -> None:
        self.teacher, self.noise, self.early = teacher, noise, early
        self.program, self.batch, self.plan, self.scales = program, batch, program.plan, scales
        self.span = range(self.plan.segments) if span is None else span
        self.graphs: dict[int, SegmentGraph] = {}
        self.outputs: dict[int, Tensor] = {}
        self.in_flight: dict[int, dict[GradientRoute, Cotangent]] = {s: {} for s in self.span}
        self.accumulated: dict[int, Cotangent | None] = dict.fromkeys(self.span)
        self.embeddings: dict[HeadCall, tuple[Tensor, Tensor, Batch]] = {}
        self.losses: dict[int, Tensor] = {}
        self.gradients: dict[nn.Parameter, Tensor] = {}
        self.outgoing: dict[GradientRoute, Cotangent] = {}
        self._keys: dict[Head, Tensor] = {}
        self._crossed = {s for unit in self.plan.units for s in range(unit.first + 1, unit.last + 1)}
        self._overflows: list[tuple[Tensor, frozenset[HeadCall]]] = []

    def forward(self, s: int, x: Tensor) -> Tensor:
        """Run segment ``s`` on the detached output of the one below; its own output, detached."""
        use = Use("forward", s)
        self._before(use)
        self.graphs[s] = self._graph(s)
        output = self.graphs[s].forward(x)
        if self.program.segment_programs[s].heads:
            self.outputs[s] = output
        if self.teacher is not None:
            with self.program.autocast(x):
                self._keys = self.teacher.forward(s)
        self._after(use)
        return output

    def run_heads(self, s: int, defer_contrast: bool = False) -> None:
        """Losses and gradients of the heads on segment ``s``.

        Args:
            s: number of the segment.
            defer_contrast: run contrastive heads only as far as their embeddings; ``contrast`` does the rest.
        """
        use = Use("heads", s)
        self._before(use)
        for call in self.program.segment_programs[s].heads:
            if defer_contrast and call.head.contrasts:
                self._embed(s, call)
                continue
            x = self.outputs[s].detach().requires_grad_()
            with self.program.autocast(x):
                loss = call.head(call.head.seen(self.program.segments[s], x), self._seen_by(call.head))
            self.losses.update(dict.fromkeys(call.units, loss.detach()))
            start = self._scale(call, self.program.weight(call)).like(loss)
            cotangent, *gradients = torch.autograd.grad(loss, [x, *call.parameters], start)
            self._collect(s, call, cotangent, gradients)
        self.outputs.pop(s, None)
        self._after(use)
        self.release()

    def walk(self, s: int) -> None:
        """This process' part of the passes that follow the forward of segment ``s``."""
        for work in self.program.segment_programs[s].walk:
            if work.segment in self.span:
                self.backward(work)
        self.release()

    def release(self) -> None:
        """Give away the gradients that are finished."""
        if self.early is not None:
            self.early.release(self.gradients)

    def backward(self, work: InputGradient | WeightGradient) -> None:
        """One pass through one segment."""
        use = Use("backward", work.segment)
        self._before(use)
        if isinstance(work, WeightGradient):
            self._weight_gradient(work.segment, work.route)
        else:
            self._input_gradient(work)
        self._after(use)
        if self.early is not None and self.early.hooks.in_slices:
            self.release()  # of all passes of a walk together they would be whole at once

    def receive(self, s: int, values: Iterable[Tensor]) -> None:
        """Cotangents for the span's last segment, of the passes that follow the forward of segment ``s`` above it."""
        top, programs = self.span[-1], self.program.segment_programs
        for route, value in zip(programs[s].crossing(top + 1), values, strict=True):
            scales = (
                self._unit_scale(unit, call)
                for program in programs[top + 1 : s + 1]
                for call in program.heads
                for unit, other in zip(call.units, call.routes, strict=True)
                if other == route
            )
            self._add(top, route, Cotangent(value, reduce(smaller, scales)))

    def take_overflows(self) -> Tensor:
        """(calls,) bool: head calls to which an overflow since the last call of this method is attributed.

        An overflow in a segment is attributed to every head whose window the segment is in.
        """
        found, self._overflows = self._overflows, []
        none = torch.zeros((), dtype=torch.bool, device=self.batch.images.device)
        flags = [[flag for flag, calls in found if call in calls] for call in self.program.calls]
        return torch.stack([torch.stack(own).any() if own else none for own in flags])

    @staticmethod
    def contrast(steps: Sequence[RoutedStep], s: int) -> None:
        """Score the deferred embeddings on segment ``s`` of all micro-batches of an optimizer step together.

        This loss counts once for the whole step. Gradients are averaged over the micro-batches afterwards, so each is
        multiplied by their number here.
        """
        first = steps[0]
        program = first.program
        for call in [call for call in program.segment_programs[s].heads if call in first.embeddings]:
            seen = [step.embeddings[call] for step in steps]
            parts = [embedding.detach().requires_grad_() for _, embedding, _ in seen]
            views = first.plan.student_views
            whole = _by_view(parts, views)
            labels = [step.batch.labels for step in steps if step.batch.labels is not None]
            keys = [batch.teacher for _, _, batch in seen if batch.teacher is not None]
            batch = first.batch._replace(
                labels=torch.cat(labels) if labels else None,
                teacher=_by_view(keys, views) if keys else None,
            )
            with program.autocast(whole):
                loss = call.head.score(whole, batch)
            start = first._scale(call, program.weight(call) * len(steps)).like(loss)
            gradients = torch.autograd.grad(loss, parts, start)
            for step, gradient in zip(steps, gradients, strict=True):
                step._backward_embedding(s, call, loss.detach(), gradient)

    def _before(self, use: Use) -> None:
        if self.early is not None:
            self.early.hooks.before(use)

    def _after(self, use: Use) -> None:
        if self.early is not None:
            self.early.hooks.after(use)

    def _embed(self, s: int, call: HeadCall) -> None:
        x = self.outputs[s].detach().requires_grad_()
        with self.program.autocast(x):
            embedding = call.head.embed(call.head.seen(self.program.segments[s], x))
        self.embeddings[call] = (x, embedding, self._seen_by(call.head))

    def _backward_embedding(self, s: int, call: HeadCall, loss: Tensor, gradient: Tensor) -> None:
        x, embedding, _ = self.embeddings.pop(call)
        self.losses.update(dict.fromkeys(call.units, loss))
        cotangent, *gradients = torch.autograd.grad(embedding, [x, *call.parameters], gradient)
        self._collect(s, call, cotangent, gradients)

    def _seen_by(self, head: Head) -> Batch:
        return self.batch._replace(teacher=self._keys.pop(head, None))

    def _scale(self, call: HeadCall, factor: float) -> Scale:
        return Scale(factor, self.scales[call.number] if self.scales is not None else None)

    def _unit_scale(self, unit: int, call: HeadCall) -> Scale:
        """Units that share a head share its cotangent; it is scaled for the heaviest, and more for the others."""
        return self._scale(call, self.program.weight(call) / self.plan.units[unit].weight)

    def _collect(self, s: int, call: HeadCall, cotangent: Tensor, gradients: Sequence[Tensor]) -> None:
        """Take in the gradients of a head call: those of its parameters, and that of its input for each unit."""
        total = sum(self.plan.units[i].weight for i in call.units)
        scale = self._scale(call, self.program.weight(call) / total)
        overflow = self._finish(call.parameters, gradients, scale)
        if self.scales is not None:
            infinite = ~torch.isfinite(cotangent).all()
            flag = infinite if overflow is None else infinite | overflow
            self._overflows.append((flag, frozenset({call})))
        for unit, route in zip(call.units, call.routes, strict=True):
            self._add(s, route, Cotangent(cotangent, self._unit_scale(unit, call)))

    def _add(self, s: int, route: GradientRoute, cotangent: Cotangent) -> None:
        """Add a cotangent to what there is at the output of segment ``s``."""
        if s < self.span.start:
            self.outgoing[route] = cotangent
        elif route.first < s:
            self.in_flight[s][route] = cotangent.plus(self.in_flight[s].get(route))
        elif s in route.learns:
            self.accumulated[s] = cotangent.plus(self.accumulated[s])

    def _graph(self, s: int) -> SegmentGraph:
        """Of segment ``s``, before it is run: by itself, or as pieces."""
        again = self.program.recomputation
        pieces = again.pieces.get(s)
        functions: Sequence[Callable[[Tensor], Tensor]]
        functions = self.program.runners[s : s + 1] if pieces is None else pieces
        behind = partial(_behind, s, self.batch, self.plan.masking, self.noise)
        runs = []
        for number, function in enumerate(functions):
            ends = behind if number == len(functions) - 1 else None
            runs.append(
                Run(
                    partial(_run, self.program, function, ends),
                    self.program.segments[s] if pieces is None else pieces[number],
                    crossed=s in self._crossed or number > 0,
                    graph=s not in again.bare,
                    again=s in again.segments,
                )
            )
        return SegmentGraph(runs)

    def _input_gradient(self, work: InputGradient) -> None:
        s, route = work.segment, work.route
        cotangent = self.in_flight[s].pop(route)
        keep = work not in self.program.recomputation.dropped
        below = self.graphs[s].input_gradient(cotangent.value, keep)
        self._add(s - 1, route, Cotangent(below, cotangent.scale))
        if s in route.learns:
            self.accumulated[s] = cotangent.plus(self.accumulated[s])

    def _weight_gradient(self, s: int, route: GradientRoute | None) -> None:
        parameters = self.program.trained(s)
        accumulated, self.accumulated[s] = self.accumulated[s], None
        cotangent = self.in_flight[s].pop(route) if route is not None else accumulated
        assert cotangent is not None
        gradients = self.graphs.pop(s).weight_gradients(cotangent.value, parameters, route is not None)
        if route is not None:
            self._add(s - 1, route, Cotangent(gradients.pop(), cotangent.scale))
        overflow = self._finish(parameters, gradients, cotangent.scale)
        if overflow is not None:
            self._overflows.append((overflow, self.program.covering(s)))

    def _finish(
        self, parameters: list[nn.Parameter], gradients: Sequence[Tensor], scale: Scale
    ) -> Tensor | None:
        """Divide gradients by their scale and add them up; whether one is infinite or NaN, with loss scales."""
        gradients = [_laid_out_like(p, g) for p, g in zip(parameters, gradients, strict=True)]
        overflow = None
        if self.scales is not None and gradients:
            overflow = unscale_(gradients, scale)
        elif scale.factor != 1.0 and gradients:
            torch._foreach_div_(gradients, scale.factor)
        for p, g in zip(parameters, gradients, strict=True):
            self.gradients[p] = self.gradients[p] + g if p in self.gradients else g
        if self.early is not None:
            self.early.added(parameters)
        return overflow


def _run(
    program: Program,
    function: Callable[[Tensor], Tensor],
    behind: Callable[[Tensor], Tensor] | None,
    x: Tensor,
) -> Tensor:
    with program.autocast(x):
        output = function(x)
        return output if behind is None else behind(output)


def _behind(s: int, batch: Batch, masking: Masking | None, noise: Noise | None, x: Tensor) -> Tensor:
    """What happens to the output of segment ``s``."""
    x = visible_tokens(s, x, batch, masking)
    return x if noise is None else noise.on(x, s)


def _by_view(parts: Sequence[Tensor], views: int) -> Tensor:
    """Micro-batches (V*B, D) -> (V*sum B, D), view-major."""
    return torch.cat([part.unflatten(0, (views, -1)) for part in parts], 1).flatten(0, 1)


def _laid_out_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """DDP's buckets want a gradient in its parameter's memory order, which a head may have left."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)
