"""LARS (You et al. 2017) as SimCLR's code has it, exact however its parameters are sharded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from framework.optim.skipping import step_unless


class Piece(NamedTuple):
    """The part of a parameter that a rank's flat tensor contains.

    Attributes:
        parameter: number of the parameter in its group, counted before sharding.
        offset: first element inside the flattened parameter.
        start: first element in the flat tensor.
        numel: how many.
    """

    parameter: int
    offset: int
    start: int
    numel: int


@dataclass(frozen=True, eq=False)
class Shard:
    """One rank's shard of a parameter group that was flattened and split over ranks, as ZeRO does.

    The engine stores it as ``group["shard"]``. The group's only parameter is then the rank's flat tensor.

    Attributes:
        parameters: names of those that were flattened, in the network.
        pieces: what of them this rank has.
        process_group: the ranks that have the rest.
        copies: ranks that have the same pieces.
        device: on which they exchange numbers; ``None`` where the shard is.
    """

    parameters: tuple[str, ...]
    pieces: tuple[Piece, ...]
    process_group: dist.ProcessGroup | None
    copies: int = 1
    device: torch.device | None = None

    def views(self, flat: Tensor) -> list[Tensor]:
        """The pieces of ``flat``, or of another tensor laid out like it."""
        return [flat.narrow(0, piece.start, piece.numel) for piece in self.pieces]


class LARS(torch.optim.Optimizer):
    """Momentum SGD whose rate is scaled, for every parameter on its own, by the size of its weights.

    With d = g + weight_decay * w::

        v <- momentum * v + lr * trust * |w| / |d| * d
        w <- w - v

    The scale is 1 where the norm of w or d is 0, and in groups with ``adapt=False``. The learning rate is
    inside the momentum buffer and there is no Nesterov variant.

    Parameters may be whole, or flat slices of several with a ``Shard`` in their group.
    A sharded group costs one all-reduce of 2 x (number of parameters) squared norms. Norms are summed in
    float64 and every other operation rounds once, so the result does not depend on where shards begin.

    Args:
        params: groups as ``parameter_groups`` makes them.
        lr: learning rate.
        momentum: decay of the momentum buffer.
        weight_decay: for groups without their own.
        trust: trust coefficient.
    """

    skip: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust": trust,
            "adapt": True,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step, or none if ``skip`` is set. ZeRO calls this once per group."""
        step_unless(self.skip, self, self._update_groups)

    def _update_groups(self) -> None:
        for group in self.param_groups:
            self._update(group)

    def _update(self, group: dict[str, Any]) -> None:
        trained = [p for p in group["params"] if p.grad is not None]
        if not trained:
            return
        weights = [p.detach() for p in trained]
        gradients = [p.grad for p in trained]
        velocities = [self._velocity(p) for p in trained]
        if shard := group.get("shard"):
            (weights, gradients, velocities) = map(shard.views, (weights[0], gradients[0], velocities[0]))
        if not weights:  # nothing but padding here, but the all-reduce needs this rank
            if group["adapt"]:
                _adapted_rates(group, trained[0], [], [])
            return
        decayed = list(torch._foreach_mul(weights, group["weight_decay"]))
        torch._foreach_add_(decayed, gradients)
        if group["adapt"]:
            torch._foreach_mul_(decayed, _adapted_rates(group, trained[0], weights, decayed))
        else:
            torch._foreach_mul_(decayed, group["lr"])
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, decayed)
        torch._foreach_sub_(weights, velocities)

    def _velocity(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state["momentum_buffer"]


def _adapted_rates(
    group: dict[str, Any], like: Tensor, weights: list[Tensor], decayed: list[Tensor]
) -> list[Tensor]:
    """Learning rate of each local tensor, as scalar tensors: the host does not wait for the GPU."""
    shard: Shard | None = group.get("shard")
    count = len(shard.parameters) if shard else len(weights)
    owners = [piece.parameter for piece in shard.pieces] if shard else range(count)
    norms = [torch.zeros((), dtype=torch.float64, device=like.device)] * (2 * count)
    for offset, tensors in ((0, weights), (count, decayed)):
        if tensors:
            for owner, norm in zip(owners, torch._foreach_norm(tensors, 2, torch.float64), strict=True):
                norms[offset + owner] = norm
    squares = torch.stack(norms).square()
    if shard:
        there = squares.to(shard.device or squares.device)
        dist.all_reduce(there, group=shard.process_group)
        squares = there.to(squares.device)
    weight_norms, decayed_norms = squares.sqrt().chunk(2)
    scales = torch.where(squares.view(2, count).all(0), group["trust"] * weight_norms / decayed_norms, 1.0)
    rates = (group["lr"] * scales).to(like.dtype)
    return [rates[owner] for owner in owners]
