"""One GPU, whose steps are replayed from a CUDA graph (``execution.cuda_graph=true``)."""

from __future__ import annotations

from framework.data.batch import Batch
from framework.engines.base import Engine, EngineSettings, OptimizerFactory, StepResult
from framework.engines.plain import PlainEngine, UpdatesAtTheEnd
from framework.execution import LocalNetwork
from framework.execution.graph import RecordedStep, Recorder, record_graph
from framework.runtime.distributed import device, world_size
from framework.runtime.errors import UserError


def build(
    net: LocalNetwork,
    make_optimizer: OptimizerFactory,
    settings: EngineSettings,
    record: Recorder = record_graph,
) -> Engine:
    """An engine that stands in for the recipe's: on one GPU there is nothing to average.

    Args:
        net: the network, on its device.
        make_optimizer: as for every engine.
        settings: of its steps.
        record: what records a step.

    Raises:
        UserError: a plan with noise or masks, whose seeds are drawn on the host.
    """
    if net.plan.noise or net.plan.masking:
        what = "noise of one step (method.noise)" if net.plan.noise else "masks of one step"
        raise UserError(f"execution.cuda_graph=true: would repeat the {what} for ever")
    optimizer = make_optimizer(net)
    steps = UpdatesAtTheEnd(net, optimizer, settings.clip, _Replayed(net, record))
    return PlainEngine(net, optimizer, steps)


def check_one_gpu() -> None:
    """Refuse machines on which a CUDA graph can't stand in for the recipe's engine.

    Raises:
        UserError: no GPU, or several ranks.
    """
    if device().type != "cuda":
        raise UserError("execution.cuda_graph=true: needs a GPU, and there is none")
    if world_size() > 1:
        raise UserError(f"execution.cuda_graph=true: is for one GPU, and there are {world_size()} ranks")


class _Replayed:
    """``PlainEngine``'s ``backward``. The first step records, when weights have been loaded."""

    def __init__(self, net: LocalNetwork, record: Recorder) -> None:
        self._net, self._record = net, record
        self._recorded: RecordedStep | None = None

    def __call__(self, micro_batches: list[Batch]) -> StepResult:
        (batch,) = micro_batches
        if self._recorded is None:
            self._recorded = RecordedStep(self._net, batch, self._record)
        self._recorded.run(batch)
        for parameter, gradient in self._recorded.gradients.items():
            parameter.grad = gradient
        # The next replay overwrites them.
        return StepResult(self._recorded.unit_losses.clone())
