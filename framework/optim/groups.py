"""Which parameters weight decay and layer adaptation apply to."""

from __future__ import annotations

from typing import Any

from torch import nn


def parameter_groups(net: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: weights; and norm parameters and biases, i.e. whatever has at most one dimension.

    The second gets neither weight decay nor LARS's adaptation (FACTS A4); ``group["adapt"]`` says so. Order
    inside a group is that of ``net.parameters()``. A group without parameters is left out.
    """
    weights = [p for p in net.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in net.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [
        {"params": weights, "weight_decay": weight_decay, "adapt": True},
        {"params": others, "weight_decay": 0.0, "adapt": False},
    ]
    return [group for group in groups if group["params"]]
