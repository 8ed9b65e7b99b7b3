"""Where ZeRO-1 and ZeRO-2 put each parameter.

ZeRO flattens a parameter group into one tensor, splits that into equal partitions and gives the optimizer this rank's
partition as its only parameter. The network's parameters are views of the flat tensor, so their addresses tell their
places, for every order and padding that DeepSpeed can be configured to use. (DeepSpeed's own map,
``param._hp_mapping``, ignores ``round_robin_gradients``.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from framework.engines.base import OptimizerState, SavedOptimizer
from framework.engines.state import COUNTERS
from framework.optim.lars import Piece, Shard


@dataclass(frozen=True, eq=False)
class Place:
    """A whole parameter in a group's flat tensor of all ranks."""

    name: str
    shape: torch.Size
    start: int


@dataclass(frozen=True, eq=False)
class PartitionedGroup:
    """One parameter group under ZeRO.

    Attributes:
        places: its parameters.
        partition: this rank's part of the flat tensor; the optimizer's only parameter of the group.
        process_group: the ranks that hold the other partitions.
    """

    places: tuple[Place, ...]
    partition: Tensor
    process_group: dist.ProcessGroup

    def shard(self) -> Shard:
        """The parts of parameters that this rank's partition contains."""
        begin = dist.get_rank(self.process_group) * self.partition.numel()
        end = begin + self.partition.numel()
        pieces = []
        for number, place in enumerate(self.places):
            first, last = max(place.start, begin), min(place.start + place.shape.numel(), end)
            if first < last:
                pieces.append(Piece(number, first - place.start, first - begin, last - first))
        return Shard(tuple(place.name for place in self.places), tuple(pieces), self.process_group)

    @property
    def leads(self) -> bool:
        """Whether this rank is the first of the group."""
        return dist.get_rank(self.process_group) == 0

    def gather(self, part: Tensor) -> Tensor | None:
        """On the group's first rank, the flat tensor put together from every rank's ``part``; elsewhere ``None``."""
        ranks = range(dist.get_world_size(self.process_group))
        parts = [torch.empty_like(part) for _ in ranks] if self.leads else None
        dist.gather(part.contiguous(), parts, group=self.process_group, group_dst=0)
        return torch.cat([p.cpu() for p in parts]) if parts else None


def partitioned_groups(zero: DeepSpeedZeroOptimizer, net: nn.Module) -> list[PartitionedGroup]:
    """The groups of a ZeRO optimizer, in the optimizer's order."""
    names = {parameter: name for name, parameter in net.named_parameters()}
    groups = []
    for parameters, flat, partition, process_group in zip(
        zero.bit16_groups,
        zero.bit16_groups_flat,
        zero.single_partition_of_fp32_groups,
        zero.real_dp_process_group,
        strict=True,
    ):
        places = tuple(
            Place(names[p], p.shape, (p.data_ptr() - flat.data_ptr()) // flat.element_size())
            for p in parameters
        )
        groups.append(PartitionedGroup(places, partition, process_group))
    return groups


def read_optimizer(zero: DeepSpeedZeroOptimizer, groups: list[PartitionedGroup]) -> OptimizerState:
    """Full copies of every parameter's state, on the CPU, on the first rank of each group; empty elsewhere."""
    states: OptimizerState = {}
    for group in groups:
        for key, value in zero.optimizer.state.get(group.partition, {}).items():
            if not torch.is_tensor(value):
                continue
            flat = None if key in COUNTERS else group.gather(value)
            for place in group.places if group.leads else ():
                full = value if flat is None else flat.narrow(0, place.start, place.shape.numel())
                states.setdefault(place.name, {})[key] = full.view(
                    value.shape if flat is None else place.shape
                ).clone()
    return states


def write_optimizer(
    zero: DeepSpeedZeroOptimizer, groups: list[PartitionedGroup], state: SavedOptimizer
) -> None:
    """Replace the optimizer's state by this rank's part of full tensors."""
    zero.optimizer.state.clear()
    for group in groups:
        shard = group.shard()
        first = state.get(group.places[0].name, {})
        for key, example in first.items():
            if key in COUNTERS:
                value = example.clone()
            else:
                value = torch.zeros_like(group.partition, requires_grad=False)
                for piece, view in zip(shard.pieces, shard.views(value), strict=True):
                    full = state[group.places[piece.parameter].name][key].reshape(-1)
                    view.copy_(full.narrow(0, piece.offset, piece.numel))
            zero.optimizer.state[group.partition][key] = value
