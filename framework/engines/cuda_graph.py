"""One GPU, whose steps are replayed from a CUDA graph (``execution.cuda_graph=true``)."""

from __future__ import annotations

import torch
from torch import Tensor

from framework.data.batch import Batch
from framework.engines.base import OptimizerFactory, StepResult, update
from framework.engines.state import HoldsState
from framework.execution import LocalNetwork
from framework.execution.graph import RecordedStep, Recorder, record_graph


class GraphedEngine(HoldsState):
    """See ``Engine``. There is nothing to average, so it serves in place of any other engine.

    Losses arrive a step late (``lag``): the host prepares the optimizer's step while the graph runs.

    Args:
        net: the network.
        make_optimizer: as for every engine.
        clip: largest norm of the gradient; 0 for no clipping.
        record: what records a step.
    """

    loads, lag = True, 1

    def __init__(
        self,
        net: LocalNetwork,
        make_optimizer: OptimizerFactory,
        *,
        clip: float,
        record: Recorder = record_graph,
    ) -> None:
        self.net = net
        self.optimizer = make_optimizer(net)
        self._clip, self._record = clip, record
        self._recorded: RecordedStep | None = None

    def step(self, micro_batches: list[Batch], lr: float) -> StepResult:
        (batch,) = micro_batches
        if self._recorded is None:  # weights are loaded by now
            self._recorded = RecordedStep(self.net, batch, self._record)
        self._recorded.run(batch)
        for parameter, gradient in self._recorded.gradients.items():
            parameter.grad = gradient
        result = _on_its_way(self._recorded.unit_losses)
        update(self.optimizer, self.net, result, lr, self._clip)
        return result

    def close(self) -> None:
        self._recorded = None


class _Copied:
    """An ``Arrival``: numbers that the device is still to copy to the host."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event()
        self._event.record()

    def wait(self) -> None:
        """Until they are there, not until the device is idle."""
        self._event.synchronize()


def _on_its_way(unit_losses: Tensor) -> StepResult:
    if not unit_losses.is_cuda:
        return StepResult(unit_losses.clone(), False)
    host = torch.empty(unit_losses.shape, dtype=unit_losses.dtype, pin_memory=True)
    host.copy_(unit_losses, non_blocking=True)
    return StepResult(host, False, _Copied())
