"""Norms of every unit's gradient, weights and update, whatever an engine shards."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from framework.engines.base import Engine
from framework.engines.host_copy import read_later
from framework.execution import LocalNetwork
from framework.optim.lars import Shard
from framework.runtime.distributed import device, is_main, world_size

KINDS = ("gradient_norms", "weight_norms", "update_norms")
Norms = dict[str, dict[str, float]]


class _Piece(NamedTuple):
    """What the optimizer of this rank has of a parameter."""

    unit: int
    weight: Tensor
    gradient: Tensor


class UnitNorms:
    """Euclidean norms of the gradient, weights and update of every unit's parameters, measured as an optimizer steps.

    Every trained parameter belongs to one unit, so that the squares add up to those of the whole network. A segment
    belongs to the unit that ends lowest among those that train it (LoCo's first unit has all segments of its window,
    every other the last of its own); of several, to the first in the plan. A head belongs to the first unit that has
    it, but for weights of segments that it shares. A unit that is left with nothing has no norms.

    The gradient is the one that the optimizer gets: averaged over micro-batches and ranks, clipped, and without weight
    decay. The weights are those after the step, the update is what they changed by.

    A step that is not measured costs nothing. One that is costs a copy of the weights that this rank steps (under ZeRO
    of one parameter group at a time), four passes over them and, where weights are spread over ranks, an all-reduce of
    3 numbers a unit. Updates that an engine would leave to the next step are made at the end of this one.

    Args:
        engine: whose optimizer is looked at.
        stages: of its pipeline.
    """

    def __init__(self, engine: Engine, stages: int = 1) -> None:
        owners = owning_units(engine.net)
        names = dict(engine.net.named_parameters())
        self._owners = owners
        self._by_name = {name: owners[parameter] for name, parameter in names.items() if parameter in owners}
        self._finish = engine.finish
        self._units = {number: engine.net.plan.units[number].name for number in sorted(set(owners.values()))}
        groups = engine.optimizer.param_groups
        shard: Shard | None = groups[0].get("shard")
        self._copies = shard.copies if shard else world_size() // stages  # ranks that step the same tensors
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self._squares: Tensor | None = None  # (3, U), of a step that is measured
        self._before: list[Tensor] | None = None
        engine.optimizer.register_step_pre_hook(self._before_step)
        engine.optimizer.register_step_post_hook(self._after_step)

    def measure(self) -> None:
        """Measure the next step; all ranks must call it, and ``result`` after the step."""
        self._finish()  # the step before
        if self._spread or is_main():
            self._squares = torch.zeros(
                len(KINDS), 1 + max(self._units), dtype=torch.float64, device=device()
            )

    def result(self) -> Callable[[], Norms]:
        """What was measured, as a function that waits for it: ``{"gradient_norms": {unit: norm}, ...}``.

        Where ranks step the same tensors, rank 0 alone measures them, and the others have nothing.
        """
        self._finish()
        squares, self._squares = self._squares, None
        if squares is None:
            return dict
        work = dist.all_reduce(squares.div_(self._copies), async_op=True) if self._spread else None
        rows = read_later(squares, work)

        def norms() -> Norms:
            return {
                kind: {name: math.sqrt(row[number]) for number, name in self._units.items()}
                for kind, row in zip(KINDS, rows(), strict=True)
            }

        return norms

    @property
    def _spread(self) -> bool:
        """Whether a rank alone does not see all weights."""
        return self._copies < world_size()

    @torch.no_grad()
    def _before_step(self, optimizer: Any, args: object, kwargs: object) -> None:
        """Called by the optimizer; ZeRO steps one group after the other, late updates one bucket."""
        if self._squares is None or self._before is not None:
            return  # the second: an optimizer of PyTorch's whose class has hooks itself, inside ours
        pieces = self._pieces(optimizer)
        self._before = [piece.weight.detach().clone() for piece in pieces]
        self._add(0, [piece.unit for piece in pieces], [piece.gradient for piece in pieces])

    @torch.no_grad()
    def _after_step(self, optimizer: Any, args: object, kwargs: object) -> None:
        if self._before is None:
            return
        pieces, updates = self._pieces(optimizer), self._before
        units, weights = [piece.unit for piece in pieces], [piece.weight.detach() for piece in pieces]
        self._add(1, units, weights)
        if weights:
            torch._foreach_sub_(updates, weights)
        self._add(2, units, updates)
        self._before = None

    def _pieces(self, optimizer: Any) -> list[_Piece]:
        return [piece for group in optimizer.param_groups for piece in self._pieces_of(group)]

    def _pieces_of(self, group: dict[str, Any]) -> list[_Piece]:
        shard: Shard | None = group.get("shard")
        if shard is None:
            return [_Piece(self._owners[p], p, p.grad) for p in group["params"] if p.grad is not None]
        (flat,) = group["params"]
        if flat.grad is None:  # late updates step some groups at a time
            return []
        units = [self._by_name[shard.parameters[piece.parameter]] for piece in shard.pieces]
        return list(map(_Piece, units, shard.views(flat), shard.views(flat.grad)))

    def _add(self, kind: int, units: list[int], tensors: list[Tensor]) -> None:
        """Add the squares of the tensors' norms to those of their units."""
        if not tensors or self._squares is None:
            return
        squares = torch.stack(torch._foreach_norm(tensors, 2, torch.float64)).square()
        self._squares[kind].index_add_(0, self._index(units), squares.to(device()))

    def _index(self, units: list[int]) -> Tensor:
        """(pieces,) int64 on the device, made once; from pinned memory, since the host would wait for other copies."""
        key = tuple(units)
        if key not in self._indices:
            host = torch.tensor(units, pin_memory=device().type == "cuda")
            self._indices[key] = host.to(device(), non_blocking=True)
        return self._indices[key]


def owning_units(net: LocalNetwork) -> dict[nn.Parameter, int]:
    """The number of the unit that each trained parameter belongs to; see ``UnitNorms``."""
    units = net.plan.units
    lowest_first = sorted(range(len(units)), key=lambda number: units[number].last)
    owners: dict[nn.Parameter, int] = {}
    for s, segment in enumerate(net.segments):
        owner = next(number for number in lowest_first if s in units[number].learns)
        for parameter in segment.parameters():
            owners.setdefault(parameter, owner)
    for number, unit in enumerate(units):
        for parameter in unit.head.parameters():
            owners.setdefault(parameter, number)
    return owners
