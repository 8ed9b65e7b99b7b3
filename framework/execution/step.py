"""One micro-batch on its way through the segments of one process: all of them, or a pipeline stage's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from framework.data.batch import Batch
from framework.execution.precision import unscale_
from framework.execution.program import GradientRoute, HeadCall, InputGradient, WeightGradient

if TYPE_CHECKING:
    from framework.execution.local_network import LocalNetwork


class Cotangent:
    """Gradient at a segment's output, ``scale`` times the true one."""

    def __init__(self, value: Tensor, scale: float) -> None:
        self.value, self.scale = value, scale

    def plus(self, other: Cotangent | None) -> Cotangent:
        """The sum, in the smaller of the two scales, so that scaling up never overflows."""
        if other is None:
            return self
        low, high = (self, other) if self.scale <= other.scale else (other, self)
        return Cotangent(torch.add(low.value, high.value, alpha=low.scale / high.scale), low.scale)


class RoutedStep:
    """Graphs that are still alive, cotangents on their way, gradients finished.

    For every segment in order: ``forward``, ``run_heads``, ``walk``.

    Args:
        network: has segments, plan and moments.
        batch: the micro-batch; the images are the input of segment 0, labels are the heads'.
        span: segments of this process; cotangents for those below end up in ``outgoing``, those that come
            from above are told by ``receive``.
        scales: the loss scale of every head call (float16 only).

    Attributes:
        losses: (unweighted, detached) by unit.
        gradients: finished, by parameter.
        leaving: cotangents that have left the span at its lower end.
    """

    def __init__(
        self,
        network: LocalNetwork,
        batch: Batch,
        span: range | None = None,
        scales: Sequence[float] | None = None,
    ) -> None:
        self.network, self.batch, self.plan, self.scales = network, batch, network.plan, scales
        self.span = range(self.plan.segments) if span is None else span
        self.crossed = {s for unit in self.plan.units for s in range(unit.first + 1, unit.last + 1)}
        self.inputs: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        self.in_flight: dict[int, dict[GradientRoute, Cotangent]] = {s: {} for s in self.span}
        self.accumulated: dict[int, Cotangent | None] = dict.fromkeys(self.span)
        self.embeddings: dict[HeadCall, tuple[Tensor, Tensor]] = {}
        self.losses: dict[int, Tensor] = {}
        self.gradients: dict[nn.Parameter, Tensor] = {}
        self.outgoing: dict[GradientRoute, Cotangent] = {}
        self._overflows: list[tuple[Tensor, list[bool]]] = []

    def forward(self, s: int, x: Tensor) -> Tensor:
        """Run segment ``s`` on the detached output of the one below; its own output, detached."""
        self.inputs[s] = x.detach().requires_grad_(s in self.crossed)
        with self.network.autocast(x):
            self.outputs[s] = self.network.runners[s](self.inputs[s])
        return self.outputs[s].detach()

    def run_heads(self, s: int, defer_contrast: bool = False) -> None:
        """Losses of the heads on segment ``s`` and their gradients; of contrastive heads, if deferred, embeddings."""
        for call in self.network.moments[s].heads:
            if defer_contrast and contrasts(self._head(call)):
                self._embed(s, call)
                continue
            x = self.outputs[s].detach().requires_grad_()
            with self.network.autocast(x):
                loss = self._head(call)(self.network.segments[s].to_map(x), self.batch)
            self.losses.update(dict.fromkeys(call.units, loss.detach()))
            heaviest, scale = self._weight(call), self._scale(call)
            parameters = self._parameters(call)
            cotangent, *gradients = torch.autograd.grad(loss * (heaviest * scale), [x, *parameters])
            self._collect(s, call, cotangent, gradients)

    def walk(self, s: int) -> None:
        """The backward work of this process that follows the forward of segment ``s``."""
        for work in self.network.moments[s].walk:
            if work.segment in self.span:
                self.backward(work)

    def backward(self, work: InputGradient | WeightGradient) -> None:
        """One pass through one segment."""
        if isinstance(work, WeightGradient):
            self._release(work.segment, work.route)
        else:
            self._pass_on(work.segment, work.route)

    def receive(self, s: int, values: Iterable[Tensor]) -> None:
        """Cotangents at the top of the span, of the walk after segment ``s`` above it."""
        top = self.span[-1]
        for route, value in zip(self.network.moments[s].crossing(top + 1), values, strict=True):
            units = (
                (i, call)
                for moment in self.network.moments[top + 1 : s + 1]
                for call in moment.heads
                for i, r in zip(call.units, call.routes, strict=True)
                if r == route
            )
            self._arrive(top, route, Cotangent(value, min(self._unit_scale(i, call) for i, call in units)))

    def take_overflows(self) -> Tensor:
        """(calls,) bool: heads that overflowed since the last call.

        A segment's overflow is blamed on every head above whose window it is in.
        """
        found, self._overflows = self._overflows, []
        device = next(self.network.parameters()).device
        if not found:
            return torch.zeros(len(self.network.calls), dtype=torch.bool, device=device)
        flags, blamed = zip(*found, strict=True)
        return (torch.stack(flags)[:, None] & torch.tensor(blamed, device=device)).any(0)

    @staticmethod
    def contrast(steps: Sequence[RoutedStep], s: int) -> None:
        """Score the deferred embeddings on segment ``s`` of all micro-batches of an optimizer step together.

        The loss counts once for the whole step, so for its average over micro-batches each gets a multiple.
        """
        first = steps[0]
        for call in [call for call in first.network.moments[s].heads if call in first.embeddings]:
            parts = [step.embeddings[call][1].detach().requires_grad_() for step in steps]
            views = first.batch.views
            whole = torch.cat([part.unflatten(0, (views, -1)) for part in parts], 1).flatten(0, 1)
            labels = [step.batch.labels for step in steps if step.batch.labels is not None]
            batch = first.batch._replace(labels=torch.cat(labels) if labels else None)
            with first.network.autocast(whole):
                loss = first._head(call).score(whole, batch)  # type: ignore[operator]
            factor = first._weight(call) * first._scale(call) * len(steps)
            gradients = torch.autograd.grad(loss * factor, parts)
            for step, gradient in zip(steps, gradients, strict=True):
                step._score(s, call, loss.detach(), gradient)

    def _embed(self, s: int, call: HeadCall) -> None:
        x = self.outputs[s].detach().requires_grad_()
        with self.network.autocast(x):
            embedding = self._head(call).embed(self.network.segments[s].to_map(x))  # type: ignore[operator]
        self.embeddings[call] = (x, embedding)

    def _score(self, s: int, call: HeadCall, loss: Tensor, gradient: Tensor) -> None:
        x, embedding = self.embeddings.pop(call)
        self.losses.update(dict.fromkeys(call.units, loss))
        cotangent, *gradients = torch.autograd.grad(embedding, [x, *self._parameters(call)], gradient)
        self._collect(s, call, cotangent, gradients)

    def _head(self, call: HeadCall) -> nn.Module:
        return self.plan.units[call.units[0]].head

    def _parameters(self, call: HeadCall) -> list[nn.Parameter]:
        return [p for p in self._head(call).parameters() if p.requires_grad]

    def _weight(self, call: HeadCall) -> float:
        return max(self.plan.units[i].weight for i in call.units)

    def _scale(self, call: HeadCall) -> float:
        return self.scales[call.number] if self.scales is not None else 1.0

    def _unit_scale(self, unit: int, call: HeadCall) -> float:
        """Units that share a head share its gradient; the heaviest sets the scale, the others a multiple of it."""
        return self._scale(call) * self._weight(call) / self.plan.units[unit].weight

    def _collect(self, s: int, call: HeadCall, cotangent: Tensor, gradients: Sequence[Tensor]) -> None:
        if self.scales is not None:
            self._note(~torch.isfinite(cotangent).all(), [c is call for c in self.network.calls])
        total = sum(self.plan.units[i].weight for i in call.units)
        self._finish(self._parameters(call), gradients, self._scale(call) * self._weight(call) / total)
        for unit, route in zip(call.units, call.routes, strict=True):
            self._arrive(s, route, Cotangent(cotangent, self._unit_scale(unit, call)))

    def _arrive(self, s: int, route: GradientRoute, cotangent: Cotangent) -> None:
        if s < self.span.start:
            self.outgoing[route] = cotangent
        elif route.first < s:
            self.in_flight[s][route] = cotangent.plus(self.in_flight[s].get(route))
        elif s in route.learns:
            self.accumulated[s] = cotangent.plus(self.accumulated[s])

    def _pass_on(self, s: int, route: GradientRoute) -> None:
        cotangent = self.in_flight[s].pop(route)
        (below,) = torch.autograd.grad(self.outputs[s], self.inputs[s], cotangent.value, retain_graph=True)
        self._arrive(s - 1, route, Cotangent(below, cotangent.scale))
        if s in route.learns:
            self.accumulated[s] = cotangent.plus(self.accumulated[s])

    def _release(self, s: int, route: GradientRoute | None) -> None:
        parameters = list(self.network.segments[s].parameters())
        output, x = self.outputs.pop(s), self.inputs.pop(s)
        accumulated, self.accumulated[s] = self.accumulated[s], None
        cotangent = self.in_flight[s].pop(route) if route is not None else accumulated
        assert cotangent is not None
        wanted = parameters if route is None else [*parameters, x]
        gradients = list(torch.autograd.grad(output, wanted, cotangent.value))
        if route is not None:
            self._arrive(s - 1, route, Cotangent(gradients.pop(), cotangent.scale))
        overflow = self._finish(parameters, gradients, cotangent.scale)
        if overflow is not None:
            units = self.plan.units
            covering = [
                any(units[i].first <= s <= units[i].last for i in c.units) for c in self.network.calls
            ]
            self._note(overflow, covering)

    def _finish(
        self, parameters: list[nn.Parameter], gradients: Sequence[Tensor], scale: float
    ) -> Tensor | None:
        gradients = [_laid_out_like(p, g) for p, g in zip(parameters, gradients, strict=True)]
        self.gradients.update(zip(parameters, gradients, strict=True))
        if self.scales is not None and gradients:
            return unscale_(gradients, scale)
        if scale != 1.0:
            torch._foreach_div_(gradients, scale)
        return None

    def _note(self, overflow: Tensor, calls: list[bool]) -> None:
        self._overflows.append((overflow, calls))


def contrasts(head: nn.Module) -> bool:
    """Whether the head compares the images of a batch with each other."""
    return getattr(head, "contrasts", False)


def _laid_out_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """DDP's buckets want a gradient in its parameter's memory order, which a head may have left."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)
