"""Place segments on stages by counted or measured cost, and forecast how busy the stages will be."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from framework.config.recipe import Recipe
from framework.cost.counting import PlanCost, plan_cost
from framework.data.batch import Batch
from framework.execution import LocalNetwork
from framework.execution.program import SegmentProgram, WeightGradient, segment_programs
from framework.execution.step import RoutedStep
from framework.local import LocalUnit, Plan
from framework.network.norm import frozen_statistics
from framework.pipeline.scheduling.placement import Costs, Placement, balanced, listed
from framework.pipeline.scheduling.schedule import Layout
from framework.pipeline.scheduling.simulation import costs_of, simulate
from framework.pipeline.scheduling.weight_readers import WeightReaders
from framework.runtime import distributed
from framework.runtime.errors import UserError

_ROUNDS = 3


@dataclass(frozen=True)
class StageForecast:
    """What a stage has, and how busy it is if time is proportional to FLOPs and messages take none.

    Attributes:
        segments: their names.
        parameters: of segments and heads.
        flops: of a micro-batch's training.
        reads: stages whose weights heads here read.
        utilization: share of the time at work.
        speedup: throughput of the pipeline / that of end-to-end 1F1B on the same stages.
    """

    segments: tuple[str, ...]
    parameters: int
    flops: float
    reads: tuple[int, ...]
    utilization: float
    speedup: float


def place(recipe: Recipe, net: LocalNetwork, num_classes: int) -> Placement:
    """The recipe's placement, the same on all ranks; collective with ``balance=time``.

    Args:
        recipe: of the run.
        net: its network.
        num_classes: of the data; for the cost of heads.

    Raises:
        UserError: more stages than segments; a list that doesn't fit; a plan or a head that can't be split over stages.
    """
    pipeline, segments = recipe.pipeline, len(net.segments)
    _check_alone(recipe, net)
    if pipeline.contrast == "batch":
        for unit in net.plan.units:
            if unit.head.contrasts and not unit.head.separable:
                raise UserError(
                    f"pipeline.contrast=batch: the head of unit {unit.name} mixes a contrast with other losses; "
                    "only pipeline.contrast=micro_batch can have it"
                )
    if isinstance(pipeline.balance, list):
        return listed(pipeline.balance, segments, pipeline.stages)
    balanced([1.0] * segments, pipeline.stages)  # too many stages are an error before anything is counted
    images = recipe.train.batch_size // recipe.micro_batches
    if pipeline.balance == "time":
        costs = distributed.from_main(measured(recipe, net, images).per_segment(net.program.segment_programs))
        return balanced(costs, pipeline.stages)
    with distributed.replicas("alone"):
        cost = plan_cost(recipe, num_classes, images)
    return balanced(counted(cost, net.program.segment_programs, pipeline.balance), pipeline.stages)


def stage_forecast(recipe: Recipe, net: LocalNetwork, cost: PlanCost) -> list[StageForecast]:
    """What each stage would have and do, simulated.

    Raises:
        UserError: as ``place``.
    """
    pipeline, programs = recipe.pipeline, net.program.segment_programs
    if isinstance(pipeline.balance, list):
        placement = listed(pipeline.balance, len(net.segments), pipeline.stages)
    else:
        balance = "flops" if pipeline.balance == "time" else pipeline.balance
        placement = balanced(counted(cost, programs, balance), pipeline.stages)
    readers, costs = WeightReaders(net, placement), flops(cost, programs)
    contrast = pipeline.contrast == "batch"
    layout = Layout(programs, placement, recipe.micro_batches, readers.reads, contrast, pipeline.lam_lag)
    ran = simulate(layout, costs_of(layout, costs))
    top = LocalUnit("end-to-end", 0, len(net.segments) - 1, net.plan.units[-1].head)
    whole = Layout(segment_programs(Plan((top,), len(net.segments))), placement, recipe.micro_batches)
    end_to_end = simulate(whole, costs_of(whole, replace(costs, heads=costs.heads[-1:])))
    parameters, per_segment = counted(cost, programs, "parameters"), costs.per_segment(programs)
    return [
        StageForecast(
            tuple(net.segments[s].name for s in placement.span(stage)),
            round(sum(parameters[s] for s in placement.span(stage))),
            sum(per_segment[s] for s in placement.span(stage)),
            tuple(sorted(owner for reader, owner in readers.reads if reader == stage)),
            ran.utilization()[stage],
            end_to_end.period() / ran.period(),
        )
        for stage in range(placement.stages)
    ]


def _check_alone(recipe: Recipe, net: LocalNetwork) -> None:
    """Refuse plans that need all segments in one process."""
    if net.plan.execution.kind == "top first" and recipe.pipelined:
        raise UserError(
            f"method.name={recipe.method.name}: its segments wait for the last one; pipeline stages can't have it"
        )
    if net.plan.execution.kind == "replay buffer" and recipe.pipeline.stages > 1:
        raise UserError(
            f"method.async_mode=buffer: must be none with pipeline.stages={recipe.pipeline.stages}"
        )


def counted(cost: PlanCost, programs: Sequence[SegmentProgram], balance: str) -> list[float]:
    """What each segment and the heads on it cost: training FLOPs, parameters or bytes.

    Bytes are the activations that autograd keeps, and weight, gradient and momentum in float32.
    """
    if balance == "flops":
        return flops(cost, programs).per_segment(programs)
    units = [[u for u in cost.units if u.last == s] for s in range(len(programs))]
    parameters = [
        float(segment.parameters + sum(u.parameters for u in above))
        for segment, above in zip(cost.segments, units, strict=True)
    ]
    if balance == "parameters":
        return parameters
    saved = [segment.activation_bytes for segment in cost.segments]
    heads = [
        sum(max(0, u.activation_bytes - sum(saved[u.first : u.last + 1])) for u in above) for above in units
    ]
    return [a + h + 12 * p for a, h, p in zip(saved, heads, parameters, strict=True)]


def flops(cost: PlanCost, programs: Sequence[SegmentProgram]) -> Costs:
    """Costs in FLOPs: an input-gradient pass costs as much as a forward pass, a weight-gradient pass twice as much.

    The latter computes the input gradients between the layers of a segment, too. A teacher runs with the forward pass.
    """
    forward = tuple(float(segment.flops) for segment in cost.segments)
    taught = cost.teacher.flops if cost.teacher is not None else (0,) * len(forward)
    both = tuple(own + teacher for own, teacher in zip(forward, taught, strict=True))
    heads = tuple(3.0 * cost.units[call.units[0]].flops for program in programs for call in program.heads)
    return Costs(both, forward, tuple(2 * f for f in forward), heads)


def measured(recipe: Recipe, net: LocalNetwork, images: int) -> Costs:
    """Costs in seconds on this rank's device, to which ``net`` is moved, for a micro-batch of noise."""
    device, size, views = distributed.device(), recipe.data.image_size, net.plan.views
    net.to(device)
    dtype = next(net.parameters()).dtype
    pixels = torch.randn(views * images, 3, size, size, device=device, dtype=dtype)
    labels = torch.zeros(images, dtype=torch.int64, device=device) if net.plan.supervised else None
    return measured_costs(net, Batch(pixels.to(memory_format=net.layout), labels, views))


def measured_costs(net: LocalNetwork, batch: Batch) -> Costs:
    """Seconds on this rank for a micro-batch: medians of three rounds after one to warm up. No state changes."""
    with frozen_statistics(net), distributed.replicas("alone"):
        rounds = [_measure(net, batch) for _ in range(1 + _ROUNDS)][1:]
    return Costs(
        *(
            tuple(statistics.median(values) for values in zip(*part, strict=True))
            for part in zip(*rounds, strict=True)
        )
    )


def _measure(net: LocalNetwork, batch: Batch) -> tuple[list[float], list[float], list[float], list[float]]:
    """Seconds of each forward, input-gradient and weight-gradient pass, and head call.

    A segment without an input-gradient pass gets the time of its forward pass.
    """
    scales = net.scales.current() if net.scales is not None else None
    step = RoutedStep(net.program, batch, scales=scales, teacher=net.teacher_pass(batch))
    clock = _Clock(batch.images.device)
    forward, heads = [0.0] * net.plan.segments, [0.0] * len(net.program.calls)
    weight_gradients = [0.0] * net.plan.segments
    input_gradients: dict[int, float] = {}
    x = net.first_input(batch)
    for s, program in enumerate(net.program.segment_programs):
        x = step.forward(s, x)
        forward[s] = clock.lap()
        step.run_heads(s)
        taken = clock.lap()
        for call in program.heads:
            heads[call.number] = taken / len(program.heads)
        for work in program.walk:
            step.backward(work)
            if isinstance(work, WeightGradient):
                weight_gradients[work.segment] = clock.lap()
            else:
                input_gradients[work.segment] = clock.lap()
    passes = [input_gradients.get(s, forward[s]) for s in range(net.plan.segments)]
    return forward, passes, weight_gradients, heads


class _Clock:
    """Seconds between two calls of ``lap``, with the device's work done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = time.perf_counter()

    def lap(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        return elapsed
