"""The engine of a plain PyTorch loop: averaged gradients in ``parameter.grad``, then one step of the optimizer."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from framework.data.batch import Batch
from framework.engines import state
from framework.engines.base import OptimizerState, Outputs, StepResult, marked, update
from framework.execution import LocalNetwork, StepOutput
from framework.optim import SkippableOptimizer


class PlainEngine:
    """See ``Engine``. DDP, FSDP2 and CUDA graphs differ in what computes the gradients.

    Args:
        net: the network; its parameters may be FSDP2's DTensors.
        optimizer: of its parameters.
        clip: largest norm of the averaged gradient; 0 for no clipping.
        backward: runs a step's micro-batches and leaves their gradients, averaged over ranks, in ``parameter.grad``.
        lag: see ``Engine``.
    """

    loads = True

    def __init__(
        self,
        net: LocalNetwork,
        optimizer: SkippableOptimizer,
        clip: float,
        backward: Callable[[list[Batch]], StepResult],
        lag: int = 0,
    ) -> None:
        self.net, self.optimizer, self.lag = net, optimizer, lag
        self._clip, self._backward = clip, backward

    def step(self, micro_batches: list[Batch], lr: float) -> StepResult:
        result = self._backward(micro_batches)
        update(self.optimizer, self.net, result, lr, self._clip)
        return result

    def whole_net(self) -> LocalNetwork:
        return self.net

    def model_state(self) -> dict[str, Tensor]:
        return state.read_model(self.net)

    def load_model_state(self, full: dict[str, Tensor]) -> None:
        state.write_model(self.net, full)

    def optimizer_state(self) -> OptimizerState:
        return state.read_optimizer(self.optimizer, self.net)

    def load_optimizer_state(self, full: OptimizerState) -> None:
        state.write_optimizer(self.optimizer, self.net, full)

    def close(self) -> None:
        self.net.zero_grad()
        del self._backward  # and with it DDP's buckets or the recorded graph


def averaged(forward: Callable[[Batch], StepOutput]) -> Callable[[list[Batch]], StepResult]:
    """``PlainEngine``'s ``backward`` where the backward pass of a step's last micro-batch averages over ranks."""

    def backward(micro_batches: list[Batch]) -> StepResult:
        outputs = Outputs()
        for batch in marked(micro_batches):
            output = forward(batch)
            (output.loss / len(micro_batches)).backward()
            outputs.add(output)
        return outputs.result()

    return backward
