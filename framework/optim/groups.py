"""Which parameters weight decay and layer adaptation apply to."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Literal

from torch import nn

Decay = Literal["weights", "all"]


def parameter_groups(
    net: nn.Module,
    weight_decay: float,
    decay: Decay = "weights",
    constant: Collection[nn.Parameter] = (),
) -> list[dict[str, Any]]:
    """Two groups: weights; and parameters of at most one dimension or in ``exempt_parameters``.

    The second holds norm parameters, biases, position embeddings and the like. It gets neither weight decay nor
    LARS's adaptation (SimCLR's code), unless ``decay`` is "all" (MLAAN's code); ``group["adapt"]`` says
    so. Of each, the parameters in ``constant`` are a group of their own, whose rate no schedule changes:
    ``group["scheduled"]`` is false. Order inside a group is that of ``net.parameters()``. A group without parameters
    is left out.
    """
    exempt, constant = exempt_parameters(net), set(constant)
    everything = decay == "all"
    groups: list[dict[str, Any]] = [
        {
            "params": [],
            "weight_decay": weight_decay if weights or everything else 0.0,
            "adapt": weights or everything,
            "scheduled": scheduled,
        }
        for scheduled in (True, False)
        for weights in (True, False)
    ]
    for p in net.parameters():
        if p.requires_grad:
            groups[2 * (p in constant) + (p.ndim <= 1 or p in exempt)]["params"].append(p)
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
