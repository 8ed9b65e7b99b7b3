"""What every engine does around its own way of averaging gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from framework.data.batch import Batch
from framework.execution import LocalNetwork, StepOutput
from framework.optim import SkippableOptimizer
from framework.runtime.distributed import mean_over_ranks

OptimizerFactory = Callable[[nn.Module], SkippableOptimizer]
OptimizerState = dict[str, dict[str, Tensor]]


class Arrival(Protocol):
    """Something on its way, such as the work of a collective."""

    def wait(self) -> object:
        """Until it is there."""


class StepResult(NamedTuple):
    """Outcome of one optimizer step.

    Attributes:
        unit_losses: (U,) averaged over micro-batches and ranks; still on the device.
        skipped: overflow in some micro-batch on some rank: weights and optimizer are as before.
        arrival: what to wait for before ``unit_losses`` is read, if anything; ``losses`` does.
    """

    unit_losses: Tensor
    skipped: bool
    arrival: Arrival | None = None

    def losses(self) -> list[float]:
        """The unit losses as numbers; waits for the device, and for pipeline stages that are behind."""
        if self.arrival is not None:
            self.arrival.wait()
        return self.unit_losses.tolist()


class Engine(Protocol):
    """Runs a network on every rank as if one process saw the whole batch.

    States are canonical: full CPU tensors by parameter name, on rank 0 and empty elsewhere when read, given
    to every rank when loaded. So they move between engines, ZeRO stages and numbers of ranks. Reading and
    loading are collective.
    """

    net: LocalNetwork
    optimizer: SkippableOptimizer
    loads: bool
    """Whether this rank needs data; the others get no micro-batches."""
    lag: int
    """Steps after which the losses of a step can be read without waiting."""

    def step(self, micro_batches: list[Batch], lr: float) -> StepResult:
        """One optimizer step on this rank's micro-batches, as many as ``accumulation``."""

    def whole_net(self) -> LocalNetwork:
        """The network, to be evaluated on every rank; collective."""

    def model_state(self) -> dict[str, Tensor]:
        """Parameters and buffers."""

    def load_model_state(self, state: dict[str, Tensor]) -> None:
        """Overwrite parameters and buffers; names and shapes must match."""

    def optimizer_state(self) -> OptimizerState:
        """State of each parameter, e.g. ``{"heads.0.fc.weight": {"momentum_buffer": ...}}``."""

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Overwrite the optimizer's state; a parameter that is missing starts afresh."""

    def close(self) -> None:
        """Free what the engine holds; the network must not be trained with it any more."""


def marked(micro_batches: list[Batch]) -> Iterator[Batch]:
    """The micro-batches of a step, the last one marked as such."""
    for number, batch in enumerate(micro_batches, start=1):
        yield batch._replace(last=number == len(micro_batches))


class Tally:
    """Collects the outputs of a step's micro-batches."""

    def __init__(self) -> None:
        self._unit_losses: list[Tensor] = []
        self._overflows: list[Tensor] = []

    def add(self, output: StepOutput) -> None:
        """Note the losses and the overflow flag of one micro-batch."""
        self._unit_losses.append(output.unit_losses)
        if output.overflow is not None:
            self._overflows.append(output.overflow)

    def result(self) -> StepResult:
        """Averages over micro-batches and ranks. Where overflow is looked for, this waits for the GPU."""
        losses = mean_over_ranks(torch.stack(self._unit_losses).mean(0))
        return StepResult(losses, bool(self._overflows) and bool(torch.stack(self._overflows).any()))


def update(optimizer: SkippableOptimizer, net: nn.Module, result: StepResult, lr: float, clip: float) -> None:
    """Step an optimizer whose parameters hold averaged gradients, then drop the gradients."""
    set_learning_rate(optimizer, lr)
    if not result.skipped:
        if clip > 0:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
    optimizer.zero_grad()


def set_learning_rate(optimizer: SkippableOptimizer, lr: float) -> None:
    """The same rate for every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
