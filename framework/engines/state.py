"""Canonical state of a network and its optimizer that every rank has whole."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from framework.engines.base import OptimizerState, SavedOptimizer
from framework.optim import SkippableOptimizer
from framework.runtime.distributed import is_main

# AdamW counts steps per parameter in a scalar that stays on the CPU and is never sharded.
COUNTERS = frozenset({"step"})


def shapes_of(net: nn.Module) -> dict[str, torch.Size]:
    """Of parameters and buffers."""
    return {name: tensor.shape for name, tensor in net.state_dict().items()}


def read_model(net: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Full copies, on rank 0's CPU, of parameters and buffers with such names; empty elsewhere."""
    state = {name: on_host(tensor) for name, tensor in net.state_dict().items() if name.startswith(prefix)}
    return state if is_main() else {}


@torch.no_grad()
def write_model(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Overwrite parameters and buffers with full tensors."""
    for name, tensor in net.state_dict().items():
        tensor.copy_(state[name])


def read_optimizer(optimizer: SkippableOptimizer, net: nn.Module) -> OptimizerState:
    """Full copies of every parameter's state on rank 0's CPU; empty elsewhere."""
    state = own_optimizer(optimizer, net)
    return state if is_main() else {}


def own_optimizer(optimizer: SkippableOptimizer, net: nn.Module) -> OptimizerState:
    """Full copies, on the CPU, of the state of every parameter that ``optimizer`` steps."""
    return {
        name: {
            key: on_host(value) for key, value in optimizer.state[parameter].items() if torch.is_tensor(value)
        }
        for name, parameter in net.named_parameters()
        if optimizer.state.get(parameter)
    }


def write_optimizer(optimizer: SkippableOptimizer, net: nn.Module, state: SavedOptimizer) -> None:
    """Replace every parameter's state."""
    optimizer.state.clear()
    for name, parameter in net.named_parameters():
        if name in state:
            optimizer.state[parameter] = {
                key: value.clone()
                if key in COUNTERS
                else torch.empty_like(value, device=parameter.device).copy_(value)
                for key, value in state[name].items()
            }


def on_host(tensor: Tensor) -> Tensor:
    """A copy in the host's memory."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
