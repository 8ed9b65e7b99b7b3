"""Which parameters weight decay and layer adaptation apply to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import nn

Decay = Literal["weights", "all"]


def parameter_groups(net: nn.Module, weight_decay: float, decay: Decay = "weights") -> list[dict[str, Any]]:
    """Two groups: weights; and whatever has at most one dimension, or is no weight in timm's eyes.

    The second holds norm parameters, biases, position embeddings and the like. It gets neither weight decay nor
    LARS's adaptation (SimCLR's code), unless ``decay`` is "all" (MLAAN's code); ``group["adapt"]`` says
    so. Order inside a group is that of ``net.parameters()``. A group without parameters is left out.
    """
    exempt = set(_named_by_timm(net))
    trained = [p for p in net.parameters() if p.requires_grad]
    weights = [p for p in trained if p.ndim > 1 and p not in exempt]
    others = [p for p in trained if p.ndim <= 1 or p in exempt]
    everything = decay == "all"
    groups = [
        {"params": weights, "weight_decay": weight_decay, "adapt": True},
        {"params": others, "weight_decay": weight_decay if everything else 0.0, "adapt": everything},
    ]
    return [group for group in groups if group["params"]]


def _named_by_timm(net: nn.Module) -> list[nn.Parameter]:
    """What timm's networks say takes no decay: position embeddings, class tokens, tables of relative positions."""
    named = []
    for module in net.modules():
        without: Callable[[], set[str]] | None = getattr(module, "no_weight_decay", None)
        names = without() if without is not None else ()
        named += [p for name, p in module.named_parameters() if name in names]
    return named
