"""Which parameters weight decay and layer adaptation apply to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import nn

Decay = Literal["weights", "all"]


def parameter_groups(net: nn.Module, weight_decay: float, decay: Decay = "weights") -> list[dict[str, Any]]:
    """Two groups: weights; and parameters of at most one dimension or in ``exempt_parameters``.

    The second holds norm parameters, biases, position embeddings and the like. It gets neither weight decay nor
    LARS's adaptation (SimCLR's code), unless ``decay`` is "all" (MLAAN's code); ``group["adapt"]`` says
    so. Order inside a group is that of ``net.parameters()``. A group without parameters is left out.
    """
    exempt = exempt_parameters(net)
    trained = [p for p in net.parameters() if p.requires_grad]
    weights = [p for p in trained if p.ndim > 1 and p not in exempt]
    others = [p for p in trained if p.ndim <= 1 or p in exempt]
    everything = decay == "all"
    groups = [
        {"params": weights, "weight_decay": weight_decay, "adapt": True},
        {"params": others, "weight_decay": weight_decay if everything else 0.0, "adapt": everything},
    ]
    return [group for group in groups if group["params"]]


def exempt_parameters(net: nn.Module) -> set[nn.Parameter]:
    """Those that modules name in ``no_weight_decay()``, timm's convention, relative to themselves.

    timm's networks name position embeddings, class tokens and tables of relative positions.
    """
    found: set[nn.Parameter] = set()
    for module in net.modules():
        names_of: Callable[[], set[str]] | None = getattr(module, "no_weight_decay", None)
        names = names_of() if names_of is not None else ()
        found.update(p for name, p in module.named_parameters() if name in names)
    return found
