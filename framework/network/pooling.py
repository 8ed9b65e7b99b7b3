"""One feature a picture: timm's ``forward_head(pre_logits=True)``, or the mean over the map."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from framework.network.layouts import ToMap
from framework.network.segments import Segment


def features(segment: Segment, x: Tensor) -> Tensor:
    """The pooled output ``x`` of a segment: (N, D).

    That of the last segment is what the network itself gives without its classifier: for a vision transformer with a
    class token this token, for ConvNeXt a norm of the mean. Other segments' is the mean over the map.
    """
    head: Callable[..., Tensor] | None = getattr(segment.backbone, "forward_head", None)
    if not segment.final or head is None:
        return segment.to_map(x).mean((2, 3))
    return head(x, pre_logits=True).flatten(1)


class NetworkPooling(nn.Module):
    """The network's own pooling as a layer of a head on its last segment; its parameters stay the network's.

    Args:
        segment: the last.
    """

    def __init__(self, segment: Segment) -> None:
        super().__init__()
        self._segment = (segment,)  # a tuple is not registered

    def forward(self, x: Tensor) -> Tensor:
        """The segment's output in the network's layout -> (N, D)."""
        return features(self._segment[0], x)


class TokenPooling(nn.Module):
    """Class token, or that and the mean of the patches one behind the other.

    Args:
        to_map: takes the patches out of the network's layout.
        mean: whether the mean is there.
    """

    def __init__(self, to_map: ToMap, mean: bool) -> None:
        super().__init__()
        self._to_map, self._mean = to_map, mean

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N, prefix + L, C) -> (N, C), or (N, 2 C) with the mean."""
        token = x[:, 0]
        return torch.cat([token, self._to_map(x).mean((2, 3))], 1) if self._mean else token


def own_pooling(segment: Segment, shape: tuple[int, ...]) -> tuple[int, tuple[str, ...]] | None:
    """What a network pools with, where that is more than the mean over its last map.

    Args:
        segment: any.
        shape: of its output for one image, in the network's layout.

    Returns:
        Channels of the feature and names of the parameters that make it; ``None`` where the mean makes it.
    """
    if not segment.final or not hasattr(segment.backbone, "forward_head"):
        return None
    like = min(segment.backbone.parameters(), key=Tensor.numel)
    modes = [(module, module.training) for module in segment.backbone.modules()]
    segment.backbone.eval()
    try:
        x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(like)
        with torch.enable_grad():
            parameters = {
                n: segment.backbone.get_parameter(n).detach().requires_grad_() for n in segment.follows
            }
            found = torch.func.functional_call(_Pooled(segment), _below("backbone", parameters), (x,))
    finally:
        for module, mode in modes:
            module.training = mode
    reached = _reached(found)
    names = tuple(name for name, parameter in parameters.items() if parameter in reached)
    mean = segment.to_map(x).mean((2, 3))
    if found.shape == mean.shape and _equal(found, mean):
        return None
    return found.shape[1], names


def _reached(output: Tensor) -> set[Tensor]:
    """The parameters that would get a gradient; none is computed, for which all would have to be on one device."""
    found: set[Tensor] = set()
    seen: set[Node] = set()
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        if node.name() == "torch::autograd::AccumulateGrad":
            found.add(node.variable)  # type: ignore[attr-defined]
    return found


def _equal(a: Tensor, b: Tensor) -> bool:
    """Of tensors on the device ``meta`` nobody knows, unless they were recorded (``network.recording``)."""
    try:
        return torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    except RuntimeError:
        if a.is_meta:
            return True
        raise


class _Pooled(nn.Module):
    """The pooling with the network registered, so that its parameters can be exchanged for a call."""

    def __init__(self, segment: Segment) -> None:
        super().__init__()
        self.backbone = segment.backbone
        self._segment = (segment,)

    def forward(self, x: Tensor) -> Tensor:
        return features(self._segment[0], x)


def _below(name: str, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{key}": tensor for key, tensor in parameters.items()}
