"""The interface of engines, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from framework.config.recipe import Sharding
from framework.data.batch import Batch
from framework.engines.host_copy import read_later
from framework.execution import LocalNetwork, StepOutput
from framework.optim import SkippableOptimizer
from framework.runtime.distributed import (
    broadcast_weights,
    device,
    is_main,
    start_sum_over_ranks,
    world_size,
)
from framework.runtime.errors import UserError

OptimizerFactory = Callable[[nn.Module], SkippableOptimizer]
OptimizerState = dict[str, dict[str, Tensor]]
Rate = Callable[[], float]
SavedOptimizer = Mapping[str, Mapping[str, Tensor]]  # the same, perhaps read from files when asked for


@dataclass(frozen=True)
class EngineSettings:
    """What a recipe says about an engine's steps.

    Attributes:
        batch_size: images per optimizer step over all ranks and micro-batches.
        micro_batches: per optimizer step; their gradients are averaged.
        clip: largest norm of the whole averaged gradient; 0 for no clipping.
        zero_stage: deepspeed only: 0, 1 or 2.
        deepspeed: deepspeed only: further keys of DeepSpeed's configuration, which then makes its steps itself.
        sharding: fsdp only.
    """

    batch_size: int
    micro_batches: int = 1
    clip: float = 0.0
    zero_stage: int = 1
    deepspeed: Mapping[str, Any] = field(default_factory=dict)
    sharding: Sharding = field(default_factory=Sharding)


class StepResult(NamedTuple):
    """Outcome of one optimizer step, on the device: the host reads of it what it wants when it wants.

    Attributes:
        unit_losses: (U,) this rank's share: summed over the ranks, averages over micro-batches and ranks.
        overflow: bool scalar, the same on every rank: in some micro-batch on some rank, so that weights and optimizer
            are as before. ``None`` where no step may be skipped.
        hopeless: (U,) bool, of float16: units for whose gradients no lower loss scale would help.
    """

    unit_losses: Tensor
    overflow: Tensor | None = None
    hopeless: Tensor | None = None

    def losses(self) -> Callable[[], list[float]]:
        """Start to sum the unit losses over the ranks, which all must; the function returned waits for them."""
        return read_later(*start_sum_over_ranks(self.unit_losses))


@dataclass(frozen=True, eq=False)
class Share:
    """What this rank keeps of an engine's state for a checkpoint, copied to the host.

    Attributes:
        number: of this share, counted from 0; ``None`` on a rank that keeps nothing.
        count: ranks that keep a share.
        model: parameters and buffers by name: of what is cut the elements in row-major order that follow those of the
            share before, as a vector; what is not cut is in the first share alone.
        optimizer: state by parameter and key, cut as the parameter is; counters are whole.
        shapes: of what is cut, whole; by name in ``model``.
    """

    number: int | None
    count: int
    model: Mapping[str, Tensor]
    optimizer: SavedOptimizer
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)


class Engine(Protocol):
    """Runs a network on every rank as if one process saw the whole batch.

    States are full CPU tensors by parameter name, whatever the engine shards, so they can be loaded by another engine,
    ZeRO stage or number of ranks. Reading gives them on rank 0 and empty dictionaries elsewhere; loading takes them on
    every rank, one by one. Both are collective.
    """

    net: LocalNetwork
    optimizer: SkippableOptimizer
    loads: bool
    """Whether this rank needs data; the others get no micro-batches."""
    lag: int
    """Steps after which the result of a step can be read without waiting."""

    def step(self, micro_batches: list[Batch], lr: Rate) -> StepResult:
        """One optimizer step on this rank's micro-batches, as many as ``accumulation``.

        ``lr`` gives the rate of scheduled parameter groups. It is asked when the gradients are launched, since it may
        have to wait for whether the step before was skipped.
        """

    def finish(self) -> None:
        """Make the updates that the last step left to the next one."""

    def whole_net(self) -> LocalNetwork:
        """The network, to be evaluated on every rank; collective."""

    def model_shapes(self) -> dict[str, torch.Size]:
        """Of all parameters and buffers, whole."""

    def model_state(self, prefix: str = "") -> dict[str, Tensor]:
        """Parameters and buffers whose names begin with ``prefix``."""

    def share(self) -> Share:
        """This rank's share of both states; the only one is rank 0's where the engine cuts nothing. Collective."""

    def load_model_state(self, state: Mapping[str, Tensor]) -> None:
        """Overwrite parameters and buffers; names and shapes must match."""

    def optimizer_state(self) -> OptimizerState:
        """State of each parameter, e.g. ``{"heads.0.fc.weight": {"momentum_buffer": ...}}``."""

    def load_optimizer_state(self, state: SavedOptimizer) -> None:
        """Overwrite the optimizer's state; a parameter that is missing starts afresh."""

    def close(self) -> None:
        """Free what the engine holds; the network must not be trained with it any more."""


def whole_share(engine: Engine) -> Share:
    """``Engine.share`` of an engine that cuts nothing; collective."""
    return Share(0 if is_main() else None, 1, engine.model_state(), engine.optimizer_state())


def prepare(net: nn.Module, settings: EngineSettings, stages: int = 1) -> None:
    """Move ``net`` to this rank's device, make its weights contiguous and rank 0's on all ranks; collective.

    What a network that was built in slices has no memory for is left to the engine.

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
    with torch.no_grad():
        for tensor in with_memory(net):
            tensor.data = tensor.data.to(
                device(), memory_format=torch.contiguous_format
            )  # DeepSpeed takes no other
    broadcast_weights(with_memory(net))


def with_memory(net: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once, but for those of a network in slices that the engine still has to make."""
    return [tensor for tensor in dict.fromkeys([*net.parameters(), *net.buffers()]) if not tensor.is_meta]


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
        """Over all micro-batches."""
        return StepResult(
            torch.stack(self._unit_losses).mean(0) / world_size(),
            torch.stack(self._overflows).any() if self._overflows else None,
            torch.stack(self._hopeless).any(0) if self._hopeless else None,
        )


def update(optimizer: SkippableOptimizer, net: nn.Module, result: StepResult, lr: Rate, clip: float) -> None:
    """Clip the averaged gradients, step the optimizer unless the step is skipped, and drop the gradients."""
    optimizer.skip = result.overflow
    set_learning_rate(optimizer, lr())
    if clip > 0:
        nn.utils.clip_grad_norm_(net.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()


def set_learning_rate(optimizer: SkippableOptimizer, lr: float) -> None:
    """The rate of every group: ``lr`` times the group's own factor, but for those that follow no schedule."""
    for group in optimizer.param_groups:
        if group.get("scheduled", True):
            group["lr"] = lr * group.get("lr_scale", 1.0)
