"""Which parameters weight decay, layer adaptation and which part of the learning rate apply to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from timm.models._manipulate import group_with_matcher
from torch import nn

from framework.runtime.errors import UserError

Decay = Literal["weights", "all"]


def parameter_groups(
    net: nn.Module, weight_decay: float, decay: Decay = "weights", layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Two groups: weights; and parameters of at most one dimension or in ``exempt_parameters``.

    The second holds norm parameters, biases, position embeddings and the like. It gets neither weight decay nor
    LARS's adaptation (SimCLR's code), unless ``decay`` is "all" (MLAAN's code); ``group["adapt"]`` says
    so. With ``layer_decay`` below 1 there are two for every layer, and ``group["lr_scale"]`` is the power of it that
    multiplies the learning rate (``rate_scales``). Order inside a group is that of ``net.parameters()``. A group
    without parameters is left out.

    Raises:
        UserError: the network doesn't say which layers it has.
    """
    exempt = exempt_parameters(net)
    trained = [p for p in net.parameters() if p.requires_grad]
    scales = rate_scales(net, layer_decay) if layer_decay < 1 else {}
    everything = decay == "all"
    groups = []
    for scale in sorted({scales.get(p, 1.0) for p in trained}):
        layer = [p for p in trained if scales.get(p, 1.0) == scale]
        weights = [p for p in layer if p.ndim > 1 and p not in exempt]
        others = [p for p in layer if p.ndim <= 1 or p in exempt]
        rest = weight_decay if everything else 0.0
        groups += [
            {"params": weights, "weight_decay": weight_decay, "adapt": True, "lr_scale": scale},
            {"params": others, "weight_decay": rest, "adapt": everything, "lr_scale": scale},
        ]
    return [group for group in groups if group["params"]]


def rate_scales(net: nn.Module, layer_decay: float) -> dict[nn.Parameter, float]:
    """Powers of ``layer_decay`` by parameter, as timm's ``param_groups_layer_decay`` has them (Clark et al. 2020).

    Layers are those that timm's ``group_matcher`` names: stem, every block, what follows. Heads, wherever they are, are
    in the last layer, as a classifier is, and their power is 0.

    Args:
        net: a ``LocalNetwork``, or a part of it that has ``rate_scales`` itself, because layers are counted over the
            whole network.
        layer_decay: above 0 and below 1.

    Raises:
        UserError: nothing in the network has a ``group_matcher``.
    """
    part: Callable[[float], dict[nn.Parameter, float]] | None = getattr(net, "rate_scales", None)
    if part is not None:
        return part(layer_decay)
    backbones = (module for module in net.modules() if hasattr(module, "group_matcher"))
    backbone = next((module for module in backbones if any(True for _ in module.parameters())), None)
    if backbone is None:
        raise UserError(
            f"optim.layer_decay={layer_decay}: the network must say which layers it has, as timm's do (group_matcher)"
        )
    matcher: Any = backbone.group_matcher
    head = ""  # which no pattern matches, so that it is in the last layer
    named = [*backbone.named_parameters(), (head, None)]
    layers: dict[str, int] = group_with_matcher(iter(named), matcher(), reverse=True)
    return {p: layer_decay ** (layers[head] - layers[name]) for name, p in backbone.named_parameters()}


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
