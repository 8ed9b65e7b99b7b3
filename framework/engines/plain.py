"""The engines of a plain PyTorch loop: averaged gradients in ``parameter.grad``, then a step of the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from framework.data.batch import Batch
from framework.engines import state
from framework.engines.base import (
    OptimizerState,
    Rate,
    SavedOptimizer,
    Share,
    StepResult,
    update,
    whole_share,
)
from framework.execution import LocalNetwork
from framework.optim import SkippableOptimizer


class Steps(Protocol):
    """Makes a plain engine's steps."""

    def step(self, micro_batches: list[Batch], lr: Rate) -> StepResult:
        """See ``Engine``; updates of weights may be left to the next step."""

    def finish(self) -> None:
        """Make those updates."""

    def close(self) -> None:
        """Make them, and free what is held."""


class PlainEngine:
    """See ``Engine``. DDP and CUDA graphs differ in how they make a step.

    Args:
        net: the network.
        optimizer: of its parameters.
        steps: makes the steps.
    """

    loads, lag = True, 1

    def __init__(self, net: LocalNetwork, optimizer: SkippableOptimizer, steps: Steps) -> None:
        self.net, self.optimizer, self._steps = net, optimizer, steps

    def step(self, micro_batches: list[Batch], lr: Rate) -> StepResult:
        return self._steps.step(micro_batches, lr)

    def finish(self) -> None:
        self._steps.finish()

    def whole_net(self) -> LocalNetwork:
        self._steps.finish()
        return self.net

    def model_shapes(self) -> dict[str, torch.Size]:
        return state.shapes_of(self.net)

    def model_state(self, prefix: str = "") -> dict[str, Tensor]:
        self._steps.finish()
        return state.read_model(self.net, prefix)

    def share(self) -> Share:
        return whole_share(self)

    def load_model_state(self, full: Mapping[str, Tensor]) -> None:
        self._steps.finish()
        state.write_model(self.net, full)

    def optimizer_state(self) -> OptimizerState:
        self._steps.finish()
        return state.read_optimizer(self.optimizer, self.net)

    def load_optimizer_state(self, full: SavedOptimizer) -> None:
        self._steps.finish()
        state.write_optimizer(self.optimizer, self.net, full)

    def close(self) -> None:
        self._steps.close()
        self.net.zero_grad()


class UpdatesAtTheEnd:
    """``Steps`` whose gradients are there when the backward pass is done.

    Args:
        net: the network.
        optimizer: of its parameters.
        clip: largest norm of the averaged gradient; 0 for no clipping.
        backward: runs a step's micro-batches and leaves their gradients, averaged over ranks, in ``parameter.grad``.
    """

    def __init__(
        self,
        net: LocalNetwork,
        optimizer: SkippableOptimizer,
        clip: float,
        backward: Callable[[list[Batch]], StepResult],
    ) -> None:
        self._net, self._optimizer, self._clip, self._backward = net, optimizer, clip, backward

    def step(self, micro_batches: list[Batch], lr: Rate) -> StepResult:
        result = self._backward(micro_batches)
        update(self._optimizer, self._net, result, lr, self._clip)
        return result

    def finish(self) -> None:
        """Nothing is left over."""

    def close(self) -> None:
        del self._backward  # and with it a recorded graph
