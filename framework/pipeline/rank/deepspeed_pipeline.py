"""DeepSpeed's pipeline engine under a schedule of our own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.schedule import PipeSchedule
from torch import Tensor

from framework.engines.base import Rate, set_learning_rate
from framework.pipeline.rank.stage_worker import StageWorker
from framework.pipeline.scheduling import schedule as do
from framework.pipeline.scheduling.schedule import Instruction
from framework.pipeline.scheduling.simulation import Event


class BoundarySchedule(PipeSchedule):
    """Instructions in the form that DeepSpeed's engine runs, one a step.

    Args:
        instructions: what to do.
        events: gets what was done when, in seconds of ``time.perf_counter``.
    """

    def __init__(self, instructions: Iterable[Instruction], events: list[Event] | None = None) -> None:
        super().__init__(micro_batches=1, stages=1, stage_id=0)
        self._instructions, self._events = instructions, events

    def steps(self) -> Iterator[list[Instruction]]:
        """One instruction at a time; DeepSpeed's engine carries it out before it asks for the next."""
        for instruction in self._instructions:
            start = time.perf_counter()
            yield [instruction]
            if self._events is not None:
                self._events.append(Event(start, start, time.perf_counter(), instruction))

    def num_pipe_buffers(self) -> int:
        """0: the worker keeps its micro-batches itself."""
        return 0


def _by_worker(method: Callable[..., None]) -> Callable[..., None]:
    def execute(engine: BoundaryEngine, **fields: int) -> None:
        method(engine.worker, **fields)

    return execute


class BoundaryEngine(PipelineEngine):
    """Reduces gradients and steps the optimizer as DeepSpeed does; ``worker`` carries out everything else.

    Attributes:
        worker: of this rank's stage.
        learning_rate: gives that of the step at hand.
    """

    worker: StageWorker
    learning_rate: Rate

    def run(self, instructions: Iterable[Instruction], events: list[Event] | None = None) -> None:
        """Carry out instructions."""
        self._exec_schedule(BoundarySchedule(instructions, events))

    def _exec_reduce(self) -> None:
        parameters = list(self.module.parameters())
        self.worker.finish_gradients(parameters)
        if self.zero_optimization():
            self._exec_reduce_grads()
        elif self.dp_world_size > 1:  # the parent would do it in float32, whatever the gradients are
            self._average([p.grad for p in parameters if p.grad is not None])

    def _average(self, gradients: list[Tensor]) -> None:
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat, group=self.mpu.get_data_parallel_group())
        flat /= self.dp_world_size
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def _exec_step(self) -> None:
        self.worker.finish_step()
        self.basic_optimizer.skip = self.worker.overflow
        set_learning_rate(self.basic_optimizer, self.learning_rate())
        self._exec_optimizer_step()

    _INSTRUCTION_MAP: ClassVar[dict[type, Callable[..., None]]] = {
        do.LoadMicroBatch: _by_worker(StageWorker.load),
        do.ReceiveActivation: _by_worker(StageWorker.receive_activation),
        do.SendActivation: _by_worker(StageWorker.send_activation),
        do.Forward: _by_worker(StageWorker.forward),
        do.Heads: _by_worker(StageWorker.heads),
        do.Contrast: _by_worker(StageWorker.contrast),
        do.ReceiveCotangents: _by_worker(StageWorker.receive_cotangents),
        do.Walk: _by_worker(StageWorker.walk),
        do.SendCotangents: _by_worker(StageWorker.send_cotangents),
        do.SendWeights: _by_worker(StageWorker.send_weights),
        do.ReceiveWeights: _by_worker(StageWorker.receive_weights),
        do.ReduceGradients: _exec_reduce,
        do.OptimizerStep: _exec_step,
    }
