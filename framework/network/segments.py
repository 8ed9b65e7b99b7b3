"""Cut a network into segments: the ordered pieces that local units are made of.

A segment owns nothing. It names children of the backbone and runs them in order, so parameter names
stay those of timm, and wrapping or replacing a child (SyncBatchNorm, for instance) is seen at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from framework.errors import UserError

CUTS = ("stage", "block")
_HEAD = ("global_pool", "fc", "head_drop")


class Shape(NamedTuple):
    """Size of one image's activation: channels, height, width."""

    channels: int
    height: int
    width: int


class Segment:
    """Consecutive children of ``backbone``, run one after the other.

    Args:
        backbone: the whole network.
        name: what tables and metrics call the segment (``"layer2"``, ``"layer2.0"``).
        paths: dotted names of the children, in order.
    """

    def __init__(self, backbone: nn.Module, name: str, paths: tuple[str, ...]) -> None:
        self.backbone, self.name, self.paths = backbone, name, paths

    def __call__(self, x: Tensor) -> Tensor:
        """Map the previous segment's output (N, C, H, W), or the images, to this segment's output."""
        for module in self.modules():
            x = module(x)
        return x

    def __repr__(self) -> str:
        return f"Segment({self.name}: {', '.join(self.paths)})"

    def modules(self) -> list[nn.Module]:
        """The children in order, as they are now."""
        return [self.backbone.get_submodule(path) for path in self.paths]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Trainable parameters, each once."""
        for module in self.modules():
            yield from (p for p in module.parameters() if p.requires_grad)


def cut(backbone: nn.Module, at: str = "stage") -> list[Segment]:
    """Cut a ResNet into segments.

    Args:
        backbone: a timm ResNet or one of this package's CIFAR ResNets.
        at: ``"stage"`` gives one segment a downsampling stage (LoCo), ``"block"`` one a residual block
            (MLAAN). The stem always belongs to the first segment.

    Raises:
        UserError: ``at`` is neither, or the network does not consist of ``layer1``, ``layer2`` ...
    """
    if at not in CUTS:
        raise UserError(f"network.cut={at!r}: a network is cut at {' or '.join(CUTS)}")
    children = [name for name, _ in backbone.named_children() if name not in _HEAD]
    stages = [name for name in children if re.fullmatch(r"layer\d+", name)]
    if not stages:
        raise UserError(f"{type(backbone).__name__} can't be cut: it has no stages named layer1, layer2, ...")
    stem = tuple(children[: children.index(stages[0])])
    names = (
        stages
        if at == "stage"
        else [f"{s}.{i}" for s in stages for i in range(len(backbone.get_submodule(s)))]
    )  # type: ignore[arg-type]
    return [Segment(backbone, name, (*stem, name) if i == 0 else (name,)) for i, name in enumerate(names)]


@torch.no_grad()
def output_shapes(segments: list[Segment], image_size: int) -> tuple[Shape, ...]:
    """Shape of every segment's output for square images, by running one image in evaluation mode.

    Raises:
        UserError: the image is too small for the network's downsampling.
    """
    backbone = segments[0].backbone
    training = [m for m in backbone.modules() if m.training]
    parameter = next(backbone.parameters())
    x = torch.zeros(1, 3, image_size, image_size, device=parameter.device, dtype=parameter.dtype)
    backbone.eval()
    shapes = []
    try:
        for segment in segments:
            x = segment(x)
            shapes.append(Shape(*x.shape[1:]))
    except RuntimeError as error:
        raise UserError(
            f"data.image_size={image_size} is too small for segment {segment.name}: {error}"
        ) from error
    finally:
        for module in training:
            module.training = True
    return tuple(shapes)
