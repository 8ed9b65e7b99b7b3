"""Run every segment once and route the gradients of all local units by hand.

Segment outputs are cut from each other, so each segment has a small graph of its own. After a head
has given its cotangent, the cotangent walks down its window through those graphs; a segment's weight
gradient is taken once, for the sum of all its cotangents, after which the graph is freed. Backward is
linear in the cotangent, so this equals running every window again, at a fraction of the cost.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from framework.batch import Batch, StepOutput
from framework.distributed import any_over_ranks
from framework.errors import UserError
from framework.execution.order import HeadCall, Moment, Route, moments
from framework.execution.precision import LossScales, autocast_type, unscale_
from framework.local.units import Plan, ReadingHead
from framework.network.norm import frozen_statistics
from framework.network.segments import Segment


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
        skip_nonfinite: bool = False,
    ) -> None:
        super().__init__()
        if len(segments) != plan.segments:
            raise UserError(f"the plan is for {plan.segments} segments, the network has {len(segments)}")
        self.backbone, self.segments, self.plan = backbone, tuple(segments), plan
        heads = {unit.head: unit.name for unit in reversed(plan.units)}
        self.heads = nn.ModuleDict({heads[u.head].replace(".", "_"): u.head for u in plan.units})
        self.moments = moments(plan)
        self.low_precision = autocast_type(precision)
        self.layout = torch.channels_last if channels_last else torch.preserve_format
        self.scales = LossScales(self._call_weights()) if precision == "fp16" else None
        self.skip_nonfinite = skip_nonfinite
        self._overflowed: Tensor | None = None

    def forward(self, batch: Batch) -> StepOutput:
        """Losses of all units on a batch; in training mode their gradients too."""
        batch = batch._replace(images=self._laid_out(batch.images))
        if self.training and torch.is_grad_enabled():
            step = _RoutedStep(self, batch)
            step.run()
            output = step.output()
            self.update_copies(batch, output.overflow)
            return output
        with torch.no_grad(), frozen_statistics(self):
            return self._evaluate(batch)

    def penalty(self) -> Tensor | None:
        """What heads add to the loss for the weights alone (scalar); ``None`` if none does."""
        penalties = [p for head in self._readers() if (p := head.penalty(self.segments)) is not None]
        return torch.stack(penalties).sum() if penalties else None

    def update_copies(self, batch: Batch, overflow: Tensor | None = None) -> None:
        """Let the copies in heads follow the segments, if an optimizer step comes next and is not skipped.

        Args:
            batch: the micro-batch just done.
            overflow: bool scalar of float16 runs; any in a step's micro-batches holds the copies still.
        """
        if overflow is not None:
            self._overflowed = overflow if self._overflowed is None else self._overflowed | overflow
        if not batch.last:
            return
        amount = 1.0 if self._overflowed is None else (~self._overflowed).float()
        self._overflowed = None
        for head in self._readers():
            head.update_copies(self.segments, amount)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Pooled output of the last segment: (N, 3, H, W) -> (N, C) float32 or better."""
        x = self._last_map(images).mean((2, 3))
        return x if x.dtype == torch.float64 else x.float()

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
        images = self._laid_out(images)
        with self.autocast(images):
            for segment in self.segments:
                images = segment(images)
        return self.segments[-1].to_map(images)

    def _evaluate(self, batch: Batch) -> StepOutput:
        losses: dict[int, Tensor] = {}
        x = batch.images
        with self.autocast(x):
            for segment, moment in zip(self.segments, self.moments, strict=True):
                x = segment(x)
                for call in moment.heads:
                    loss = self.plan.units[call.units[0]].head(segment.to_map(x), batch)
                    losses.update(dict.fromkeys(call.units, loss))
        return _output(self.plan, losses, self.penalty())

    def _readers(self) -> list[ReadingHead]:
        return [head for head in self.heads.values() if isinstance(head, ReadingHead)]

    def _call_weights(self) -> list[float]:
        calls = [call for moment in self.moments for call in moment.heads]
        return [max(self.plan.units[i].weight for i in call.units) for call in calls]


class _Cotangent:
    """Gradient at a segment's output, ``scale`` times the true one."""

    def __init__(self, value: Tensor, scale: float) -> None:
        self.value, self.scale = value, scale

    def plus(self, other: _Cotangent | None) -> _Cotangent:
        """The sum, in the smaller of the two scales, so that scaling up never overflows."""
        if other is None:
            return self
        low, high = (self, other) if self.scale <= other.scale else (other, self)
        return _Cotangent(torch.add(low.value, high.value, alpha=low.scale / high.scale), low.scale)


class _RoutedStep:
    """The state of one forward: graphs that are still alive, cotangents on their way, gradients finished."""

    def __init__(self, network: LocalNetwork, batch: Batch) -> None:
        self.network, self.batch, self.plan = network, batch, network.plan
        segments = range(self.plan.segments)
        self.crossed = {s for unit in self.plan.units for s in range(unit.first + 1, unit.last + 1)}
        self.inputs: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        self.travelling: list[dict[Route, _Cotangent]] = [{} for _ in segments]
        self.arrived: list[_Cotangent | None] = [None for _ in segments]
        self.losses: dict[int, Tensor] = {}
        self.penalty: Tensor | None = None
        self.gradients: dict[nn.Parameter, Tensor] = {}
        self.scales = iter(network.scales.current()) if network.scales is not None else None
        self.overflows: list[Tensor] = []
        self.blame: list[tuple[Tensor, int]] = []

    def run(self) -> None:
        """Forward through the segments, each followed by the backward work that it makes possible."""
        x = self.batch.images
        for s, (segment, moment) in enumerate(zip(self.network.segments, self.network.moments, strict=True)):
            self.inputs[s] = x.detach().requires_grad_(s in self.crossed)
            with self.network.autocast(x):
                self.outputs[s] = segment(self.inputs[s])
            x = self.outputs[s].detach()
            for call in moment.heads:
                self._run_head(call, x, s)
            self._walk_down(moment, s)
        self._penalise()

    def output(self) -> StepOutput:
        """Losses, attached to all parameters by a node that hands the finished gradients over."""
        result = _output(self.plan, self.losses, self.penalty)
        overflow = self._overflow()
        loss = _HandOver.apply(result.loss, list(self.gradients.values()), *self.gradients)
        return StepOutput(loss, result.unit_losses, overflow)

    def _run_head(self, call: HeadCall, x: Tensor, s: int) -> None:
        head = self.plan.units[call.units[0]].head
        weights = [self.plan.units[i].weight for i in call.units]
        # Units that share a head share its gradient; the heaviest sets the scale, the others a multiple of it.
        heaviest = max(weights)
        loss_scale = next(self.scales) if self.scales is not None else 1.0
        x = x.detach().requires_grad_()
        with self.network.autocast(x):
            loss = head(self.network.segments[s].to_map(x), self.batch)
        self.losses.update(dict.fromkeys(call.units, loss.detach()))
        parameters = _trainable(head.parameters())
        cotangent, *gradients = torch.autograd.grad(loss * (heaviest * loss_scale), [x, *parameters])
        if self.scales is not None:
            self.overflows.append(~torch.isfinite(cotangent).all())
        self._finish(parameters, gradients, loss_scale * heaviest / sum(weights))
        for weight, route in zip(weights, call.routes, strict=True):
            self._arrive(s, route, _Cotangent(cotangent, loss_scale * heaviest / weight))

    def _arrive(self, s: int, route: Route, cotangent: _Cotangent) -> None:
        if route.first < s:
            self.travelling[s][route] = cotangent.plus(self.travelling[s].get(route))
        elif s in route.learns:
            self.arrived[s] = cotangent.plus(self.arrived[s])

    def _walk_down(self, moment: Moment, top: int) -> None:
        for s in range(top, -1, -1):
            due = [route for route in self.travelling[s] if route in moment.walks]
            released = s in moment.releases
            if released and len(due) == 1 and self.arrived[s] is None and s in due[0].learns:
                self._release(s, self.travelling[s].pop(due[0]), due[0])
                continue
            for route in due:
                self._pass_on(s, route)
            if released:
                arrived = self.arrived[s]
                assert arrived is not None and not self.travelling[s]
                self._release(s, arrived)

    def _pass_on(self, s: int, route: Route) -> None:
        """Input-gradient pass of one route; the graph stays."""
        cotangent = self.travelling[s].pop(route)
        (below,) = torch.autograd.grad(self.outputs[s], self.inputs[s], cotangent.value, retain_graph=True)
        self._arrive(s - 1, route, _Cotangent(below, cotangent.scale))
        if s in route.learns:
            self.arrived[s] = cotangent.plus(self.arrived[s])

    def _release(self, s: int, cotangent: _Cotangent, route: Route | None = None) -> None:
        """Weight-gradient pass; where a single route is left, its input gradient comes with it. Frees the graph."""
        parameters = list(self.network.segments[s].parameters())
        output, x = self.outputs.pop(s), self.inputs.pop(s)
        self.arrived[s] = None
        wanted = parameters if route is None else [*parameters, x]
        gradients = list(torch.autograd.grad(output, wanted, cotangent.value))
        if route is not None:
            self._arrive(s - 1, route, _Cotangent(gradients.pop(), cotangent.scale))
        overflow = self._finish(parameters, gradients, cotangent.scale)
        if overflow is not None:
            self.blame.append((overflow, s))

    def _penalise(self) -> None:
        penalty = self.network.penalty()
        if penalty is None:
            return
        self.penalty = penalty.detach()
        found = torch.autograd.grad(penalty, list(self.gradients), allow_unused=True)
        for parameter, gradient in zip(self.gradients, found, strict=True):
            if gradient is not None:
                self.gradients[parameter] = self.gradients[parameter] + gradient

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

    def _overflow(self) -> Tensor | None:
        """Move the loss scales; a segment that overflowed is blamed on every head above whose window it is in."""
        scales = self.network.scales
        if scales is None:
            return self._nonfinite() if self.network.skip_nonfinite else None
        flags = torch.stack(self.overflows)
        calls = [call for moment in self.network.moments for call in moment.heads]
        for overflow, s in self.blame:
            covering = [
                any(self.plan.units[i].first <= s <= self.plan.units[i].last for i in c.units) for c in calls
            ]
            flags = flags | (overflow & torch.tensor(covering, device=flags.device))
        return scales.update(flags)

    def _nonfinite(self) -> Tensor:
        """Whether any loss or gradient on any rank is infinite or NaN."""
        seen = [*self.losses.values(), *torch._foreach_norm(list(self.gradients.values()))]
        return any_over_ranks(~torch.isfinite(torch.stack([x.float() for x in seen])).all())


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


def _laid_out_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """DDP's buckets want a gradient in its parameter's memory order, which a head may have left."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def _trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [p for p in parameters if p.requires_grad]
