"""The interface of engines, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from framework.data.batch import Batch
from framework.engines.host_copy import Pending, copied_to_host
from framework.execution import LocalNetwork, StepOutput
from framework.optim import SkippableOptimizer
from framework.runtime.distributed import broadcast_weights, device, start_mean_over_ranks, world_size
from framework.runtime.errors import UserError

OptimizerFactory = Callable[[nn.Module], SkippableOptimizer]
OptimizerState = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class EngineSettings:
    """What a recipe says about an engine's steps.

    Attributes:
        batch_size: images per optimizer step over all ranks and micro-batches.
        micro_batches: per optimizer step; their gradients are averaged.
        clip: largest norm of the whole averaged gradient; 0 for no clipping.
        zero_stage: deepspeed only: 0, 1 or 2.
        deepspeed: deepspeed only: further keys of DeepSpeed's configuration, which then makes its steps itself.
    """

    batch_size: int
    micro_batches: int = 1
    clip: float = 0.0
    zero_stage: int = 1
    deepspeed: Mapping[str, Any] = field(default_factory=dict)


class StepResult(NamedTuple):
    """Outcome of one optimizer step.

    Attributes:
        unit_losses: (U,) averaged over micro-batches and ranks.
        skipped: overflow in some micro-batch on some rank: weights and optimizer are as before.
        pending: must complete before ``unit_losses`` is read; ``losses`` waits for it.
        hopeless: numbers of the units for whose gradients the step was skipped, where no lower loss scale would help
            (float16).
    """

    unit_losses: Tensor
    skipped: bool
    pending: Pending | None = None
    hopeless: tuple[int, ...] = ()

    def losses(self) -> list[float]:
        """The unit losses as numbers; waits for the device, and for pipeline stages that are behind."""
        if self.pending is not None:
            self.pending.wait()
        return self.unit_losses.tolist()


class Engine(Protocol):
    """Runs a network on every rank as if one process saw the whole batch.

    States are full CPU tensors by parameter name, whatever the engine shards, so they can be loaded by another engine,
    ZeRO stage or number of ranks. Reading gives them on rank 0 and empty dictionaries elsewhere; loading takes them on
    every rank. Both are collective.
    """

    net: LocalNetwork
    optimizer: SkippableOptimizer
    loads: bool
    """Whether this rank needs data; the others get no micro-batches."""
    lag: int
    """Steps after which the losses of a step can be read without waiting."""

    def step(self, micro_batches: list[Batch], lr: float) -> StepResult:
        """One optimizer step on this rank's micro-batches, as many as ``accumulation``.

        ``lr`` is the rate of scheduled parameter groups.
        """

    def finish(self) -> None:
        """Make the updates that the last step left to the next one."""

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


def prepare(net: nn.Module, settings: EngineSettings, stages: int = 1) -> None:
    """Move ``net`` to this rank's device, make its weights contiguous and rank 0's on all ranks; collective.

    A network still computes in channels-last order if its images come in it.

    Args:
        net: the network.
        settings: of the engine to come.
        stages: pipeline stages; the ranks of one pipeline share a part of the batch.

    Raises:
        UserError: the batch can't be divided into equal micro-batches for all replicas.
    """
    parts = settings.micro_batches * world_size() // stages
    if settings.batch_size % parts:
        replicas = f"{world_size() // stages} {'ranks' if stages == 1 else 'replicas'}"
        raise UserError(
            f"train.batch_size={settings.batch_size}: must be a multiple of {parts} "
            f"(train.accumulation={settings.micro_batches} x {replicas})"
        )
    net.to(device())
    convert: Callable[..., nn.Module] = net.to  # its overloads lack memory_format alone before torch 2.15
    convert(memory_format=torch.contiguous_format)  # DeepSpeed and FSDP2 take no other
    broadcast_weights(net)


def marked(micro_batches: list[Batch]) -> Iterator[Batch]:
    """The micro-batches of a step, the last one marked as such."""
    for number, batch in enumerate(micro_batches, start=1):
        yield batch._replace(last=number == len(micro_batches))


class Outputs:
    """Losses and overflow flags of a step's micro-batches."""

    def __init__(self) -> None:
        self._unit_losses: list[Tensor] = []
        self._overflows: list[Tensor] = []
        self._hopeless: list[Tensor] = []

    def add(self, output: StepOutput) -> None:
        """Note the losses and the overflow flags of one micro-batch."""
        self._unit_losses.append(output.unit_losses)
        if output.overflow is not None:
            self._overflows.append(output.overflow)
        if output.hopeless is not None:
            self._hopeless.append(output.hopeless)

    def result(self) -> StepResult:
        """Averages over micro-batches and ranks. Where overflow is looked for, this waits for the GPU."""
        losses, pending = copied_to_host(*start_mean_over_ranks(torch.stack(self._unit_losses).mean(0)))
        skipped = bool(self._overflows) and bool(torch.stack(self._overflows).any())
        hopeless = numbers_of(torch.stack(self._hopeless).any(0)) if skipped and self._hopeless else ()
        return StepResult(losses, skipped, pending, hopeless)


def lag_of(net: LocalNetwork) -> int:
    """``Engine.lag`` where the losses travel by themselves: 1, or 0 where the host has to know of every overflow."""
    return 0 if net.may_skip else 1


def numbers_of(units: Tensor) -> tuple[int, ...]:
    """Of the units that are marked in (U,) bool; waits for the device."""
    return tuple(units.nonzero().flatten().tolist())


def update(optimizer: SkippableOptimizer, net: nn.Module, result: StepResult, lr: float, clip: float) -> None:
    """Clip the averaged gradients, step the optimizer unless the step is skipped, and drop the gradients."""
    set_learning_rate(optimizer, lr)
    if not result.skipped:
        if clip > 0:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
    optimizer.zero_grad()


def set_learning_rate(optimizer: SkippableOptimizer, lr: float) -> None:
    """The rate of every group: ``lr`` times the group's own factor, but for those that follow no schedule."""
    for group in optimizer.param_groups:
        if group.get("scheduled", True):
            group["lr"] = lr * group.get("lr_scale", 1.0)
