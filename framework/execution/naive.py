"""The definition, taken literally: run the segments of every window again and let autograd do the rest.

The reference for tests and for the benchmark; 1.2 to 3.8 times the cost of the routed step.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from framework.batch import Batch
from framework.execution.routing import LocalNetwork
from framework.network.norm import frozen_statistics


def naive_gradients(network: LocalNetwork, batch: Batch) -> tuple[list[Tensor], dict[nn.Parameter, Tensor]]:
    """Unit losses (detached, unweighted) and the gradient of their weighted sum for every parameter.

    A segment's first run moves BatchNorm's statistics, its repetitions do not (FACTS M16).
    """
    segments, units = network.segments, network.plan.units
    losses: dict[int, Tensor] = {}
    gradients: dict[nn.Parameter, Tensor] = {}
    boundary = {0: batch.images}
    for u in sorted(range(len(units)), key=lambda u: units[u].last):
        unit = units[u]
        for s in range(max(boundary), unit.first):
            with torch.no_grad(), network.autocast(boundary[s]):
                boundary[s + 1] = segments[s](boundary[s])
        x = boundary[unit.first].detach()
        for s in range(unit.first, unit.last + 1):
            seen = s + 1 in boundary
            with frozen_statistics(network) if seen else nullcontext(), network.autocast(x):
                x = segments[s](x)
            boundary.setdefault(s + 1, x.detach())
        with network.autocast(x):
            loss = unit.head(segments[unit.last].to_map(x), batch)
        losses[u] = loss.detach()
        learning = [p for s in unit.learns for p in segments[s].parameters()] + list(unit.head.parameters())
        for p, g in zip(learning, torch.autograd.grad(loss * unit.weight, learning), strict=True):
            gradients[p] = gradients[p] + g if p in gradients else g
    return [losses[u] for u in range(len(units))], gradients
