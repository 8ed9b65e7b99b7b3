"""Canonical state of a network and its optimizer whose tensors are plain or FSDP2's DTensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

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
    state = {name: _full(tensor) for name, tensor in net.state_dict().items() if name.startswith(prefix)}
    return state if is_main() else {}


@torch.no_grad()
def write_model(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Overwrite parameters and buffers with full tensors."""
    for name, tensor in net.state_dict().items():
        tensor.copy_(_like(tensor, state[name]))


def read_optimizer(optimizer: SkippableOptimizer, net: nn.Module) -> OptimizerState:
    """Full copies of every parameter's state on rank 0's CPU; empty elsewhere."""
    state = own_optimizer(optimizer, net)
    return state if is_main() else {}


def own_optimizer(optimizer: SkippableOptimizer, net: nn.Module) -> OptimizerState:
    """Full copies, on the CPU, of the state of every parameter that ``optimizer`` steps."""
    return {
        name: {
            key: _full(value) for key, value in optimizer.state[parameter].items() if torch.is_tensor(value)
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
                key: value.clone() if key in COUNTERS else _like(parameter, value)
                for key, value in state[name].items()
            }


def _full(tensor: Tensor) -> Tensor:
    whole = tensor.detach()
    if isinstance(whole, DTensor):
        whole = whole.full_tensor()
    return torch.empty(whole.shape, dtype=whole.dtype).copy_(whole)


def _like(tensor: Tensor, full: Tensor) -> Tensor:
    """A copy of ``full``, which every rank has, on the device of ``tensor`` and sharded like it; sends nothing."""
    full = torch.empty_like(full, device=tensor.device).copy_(full)
    if isinstance(tensor, DTensor):
        return distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None)
    return full
