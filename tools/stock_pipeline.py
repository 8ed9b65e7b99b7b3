"""The other side of ``bench_pipeline.py``: DeepSpeed's own PipelineEngine and 1F1B on the same segments."""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import torch
from benched_steps import CONTRASTIVE, options
from deepspeed.runtime.pipe import schedule as stock
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from torch import Tensor, nn

from framework.data.batch import Batch
from framework.engines.deepspeed import checked_config, join_ranks
from framework.execution import LocalNetwork
from framework.model import local_network
from framework.pipeline.scheduling.balance import measured_costs
from framework.pipeline.scheduling.placement import Placement, balanced
from framework.pipeline.scheduling.schedule import (
    Forward,
    Instruction,
    LoadMicroBatch,
    OptimizerStep,
    ReceiveActivation,
    ReceiveCotangents,
    ReduceGradients,
    SendActivation,
    SendCotangents,
    Walk,
)
from framework.pipeline.scheduling.simulation import Event
from framework.runtime import distributed

CLASSES = 10

# DeepSpeed's instructions as ours, for timelines.
_ALIKE: dict[type, Callable[[int], Instruction]] = {
    stock.LoadMicroBatch: LoadMicroBatch,
    stock.ForwardPass: lambda buffer: Forward(buffer, 0),
    stock.BackwardPass: lambda buffer: Walk(buffer, 0),
    stock.SendActivation: SendActivation,
    stock.RecvActivation: ReceiveActivation,
    stock.SendGrad: lambda buffer: SendCotangents(buffer, 0),
    stock.RecvGrad: lambda buffer: ReceiveCotangents(buffer, 0),
    stock.ReduceGrads: lambda _: ReduceGradients(),
    stock.ReduceTiedGrads: lambda _: ReduceGradients(),
    stock.OptimizerStep: lambda _: OptimizerStep(),
}


def network(method: str, arguments: argparse.Namespace) -> LocalNetwork:
    """The benchmark's network under a method, from the same random weights each time."""
    torch.manual_seed(0)
    classes = 0 if method in CONTRASTIVE else CLASSES
    return local_network(
        arguments.network,
        method,
        options(method, arguments.head, window=2),
        image_size=arguments.image_size,
        num_classes=classes,
        cut=arguments.cut,
    ).train()


def batches_of(net: LocalNetwork, count: int, arguments: argparse.Namespace) -> list[Batch]:
    """Micro-batches of noise."""
    views, size = net.plan.views, arguments.image_size
    images = torch.randn(arguments.images, 3, size, size)
    labels = torch.randint(CLASSES, (arguments.images,)) if net.plan.supervised else None
    return [Batch(images, labels, views)] * count


def placement(end_to_end: LocalNetwork, batch: Batch, stages: int) -> Placement:
    """Stages of equal measured cost, for end-to-end training; rank 0's on all ranks."""
    costs = measured_costs(end_to_end, batch).per_segment(end_to_end.program.segment_programs)
    return balanced(distributed.from_main(costs), stages)


class _Layer(nn.Module):
    """A segment, and the trunk of the head on it."""

    def __init__(self, net: LocalNetwork, number: int) -> None:
        super().__init__()
        segment = net.segments[number]
        self.steps = nn.Sequential(*segment.runs(training=True))
        self.own = nn.ParameterList(segment.parameters())  # also those of no module, such as a class token
        heads = [unit.head for unit in net.plan.units if unit.last == number]
        self.trunk: Any = heads[0].trunk if heads else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(self.steps(x))


class _Module(PipelineModule):
    def __init__(self, layers: list[nn.Module], bounds: tuple[int, ...], loss: Any) -> None:
        self.bounds = bounds
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            super().__init__(layers=layers, num_stages=len(bounds) - 1, loss_fn=loss)

    def _partition_layers(self, method: str = "") -> None:
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.bounds[stage], stop=self.bounds[stage + 1])


class _Timed(stock.PipeSchedule):
    """DeepSpeed's schedule, an instruction at a time, with a clock."""

    def __init__(self, inner: stock.TrainSchedule, events: list[Event]) -> None:
        super().__init__(inner.micro_batches, inner.stages, inner.stage_id)
        self._inner, self._recorded = inner, events

    def steps(self) -> Iterator[list[stock.PipeInstruction]]:
        for instructions in self._inner.steps():
            for instruction in instructions:
                start = time.perf_counter()
                yield [instruction]
                alike = _ALIKE[type(instruction)](instruction.kwargs.get("buffer_id", 0))
                self._recorded.append(Event(start, start, time.perf_counter(), alike))

    def num_pipe_buffers(self) -> int:
        return self._inner.num_pipe_buffers()


class _Engine(PipelineEngine):
    recorded: list[Event]

    def _train_schedule(self) -> stock.PipeSchedule:
        return _Timed(super()._train_schedule(), self.recorded)


class OneForwardOneBackward:
    """End-to-end training of ``net`` in DeepSpeed's pipeline."""

    def __init__(
        self,
        net: LocalNetwork,
        make_optimizer: Callable[[nn.Module], Any],
        spread: Placement,
        batches: list[Batch],
    ) -> None:
        join_ranks()
        objective: Any = net.plan.units[-1].head.objective

        def loss(output: Tensor, labels: Tensor) -> Tensor:
            with distributed.replicas("alone"):
                return objective(output, batches[0]._replace(labels=labels))

        module = _Module([_Layer(net, s) for s in range(len(net.segments))], spread.bounds, loss)
        images = len(batches[0].images)
        config = {
            "train_batch_size": images * len(batches),
            "train_micro_batch_size_per_gpu": images,
            "gradient_accumulation_steps": len(batches),
            "gradient_clipping": 0.0,
            "steps_per_print": 10**9,
        }
        self._engine = _Engine(
            args=None,
            model=module,
            optimizer=make_optimizer(module),
            mpu=module.mpu(),
            config=config,
            config_class=checked_config(config, module.mpu()),
        )
        for group in self._engine.optimizer.param_groups:
            group["lr"] = 1e-3
        labels = torch.zeros(images, dtype=torch.int64)
        self._data = cycle([(b.images, b.labels if b.labels is not None else labels) for b in batches])

    def run(self, steps: int, events: list[Event]) -> None:
        """So many steps; ``events`` gets what this rank did."""
        self._engine.recorded = events
        for _ in range(steps):
            self._engine.train_batch(self._data)

    def close(self) -> None:
        """Free what the engine holds."""
        self._engine.destroy()
