"""The definition, taken literally: run the segments of every window again and let autograd do the rest.

The reference for tests and for the benchmark, where it takes up to 2.25 times as long as the routed step (ResNet-32,
windows of 3, one CPU thread), and the same where no windows overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from framework.data.batch import Batch
from framework.execution.local_network import LocalNetwork
from framework.execution.masks import visible_tokens
from framework.local.head import Head
from framework.network.norm import frozen_statistics


def naive_gradients(
    network: LocalNetwork, batch: Batch, bn_update: Literal["once", "all"] = "once"
) -> tuple[list[Tensor], dict[nn.Parameter, Tensor]]:
    """Unit losses (detached, unweighted), every parameter's gradient of their weighted sum and the penalty.

    What heads do once a step happens as in a routed step.

    Args:
        network: in training mode.
        batch: a micro-batch.
        bn_update: "once": only a segment's first run updates BatchNorm's running statistics, as in a routed step.
            "all": its repetitions do so too, as in MLAAN's code.
    """
    network.start_micro_batch()
    batch = network.masked(batch)
    segments, units = network.segments, network.plan.units
    losses: dict[int, Tensor] = {}
    gradients: dict[nn.Parameter, Tensor] = {}
    boundary = {0: network.first_input(batch)}
    keys = _teacher_keys(network, batch)
    top_first = network.plan.execution.kind == "top first"
    for u in sorted(range(len(units)), key=lambda u: units[u].last, reverse=top_first):
        unit = units[u]
        for s in range(max(boundary), unit.first):
            with torch.no_grad(), network.autocast(boundary[s]):
                boundary[s + 1] = _run(network, s, boundary[s], batch)
        x = boundary[unit.first].detach()
        for s in range(unit.first, unit.last + 1):
            seen = s + 1 in boundary and bn_update == "once"
            with frozen_statistics(network) if seen else nullcontext(), network.autocast(x):
                x = _run(network, s, x, batch)
            boundary.setdefault(s + 1, x.detach())
        with network.autocast(x):
            for_head = batch._replace(teacher=keys[unit.last].get(unit.head))
            loss = unit.head(unit.head.seen(segments[unit.last], x), for_head)
        losses[u] = loss.detach()
        learning = [p for s in unit.learns for p in segments[s].parameters()]
        learning += [p for p in unit.head.parameters() if p.requires_grad]
        _add(gradients, learning, torch.autograd.grad(loss * unit.weight, learning))
    if (penalty := network.penalty()) is not None:
        everything = list(gradients)
        _add(gradients, everything, torch.autograd.grad(penalty, everything, allow_unused=True))
    network.end_micro_batch(batch)
    return [losses[u] for u in range(len(units))], gradients


def _run(network: LocalNetwork, s: int, x: Tensor, batch: Batch) -> Tensor:
    output = network.segments[s](x)
    output = visible_tokens(s, output, batch, network.plan.masking)
    return output if network.noise is None else network.noise.on(output, s)


def _teacher_keys(network: LocalNetwork, batch: Batch) -> list[dict[Head, Tensor]]:
    """By segment, what the teacher embeds for the heads on it."""
    teacher = network.teacher_pass(batch)
    if teacher is None:
        return [{} for _ in network.segments]
    with network.autocast(batch.images):
        return [teacher.forward(s) for s in range(len(network.segments))]


def _add(
    gradients: dict[nn.Parameter, Tensor], parameters: list[nn.Parameter], found: Sequence[Tensor | None]
) -> None:
    for p, g in zip(parameters, found, strict=True):
        if g is not None:
            gradients[p] = gradients[p] + g if p in gradients else g
