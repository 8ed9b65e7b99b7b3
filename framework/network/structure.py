"""What a network is made of: stem, blocks grouped in stages, tail. One short function a family.

A step is the dotted name of a child of the backbone, or of one of its methods (``_pos_embed``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from math import isqrt
from typing import Any, NamedTuple, cast

from timm.models.convnext import ConvNeXt
from timm.models.densenet import DenseNet
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.regnet import RegNet
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from framework.network.convnet import ConvNet
from framework.runtime.errors import UserError

ToMap = Callable[[Tensor], Tensor]


class Block(NamedTuple):
    """The smallest piece that a cut may leave whole: its name, and the steps that it runs in order."""

    name: str
    steps: tuple[str, ...]


class Stage(NamedTuple):
    """Blocks at one resolution."""

    name: str
    blocks: tuple[Block, ...]


class Structure(NamedTuple):
    """Steps of ``forward_features``, in order, and the layout of what passes between them.

    Attributes:
        stem: before the first block.
        stages: the blocks.
        tail: after the last block.
        to_map: turns an activation into the map (N, C, H, W) that heads read.
    """

    stem: tuple[str, ...]
    stages: tuple[Stage, ...]
    tail: tuple[str, ...]
    to_map: ToMap


def structure(backbone: nn.Module) -> Structure:
    """Stem, stages and tail of a network.

    Raises:
        UserError: its family is not known here.
    """
    for kind, family in _FAMILIES.items():
        # A subclass with a forward of its own does not run the steps that are listed here.
        if isinstance(backbone, kind) and type(backbone).forward_features is kind.forward_features:
            return family(backbone)
    names = ", ".join(kind.__name__ for kind in _FAMILIES)
    raise UserError(f"{type(backbone).__name__} can't be cut into segments; these families can: {names}")


def is_map(x: Tensor) -> Tensor:
    """(N, C, H, W) as it is."""
    return x


def _from_channels_last(x: Tensor) -> Tensor:
    """(N, H, W, C) -> (N, C, H, W), a view."""
    return x.permute(0, 3, 1, 2)


def _from_tokens(x: Tensor, prefix: int) -> Tensor:
    """(N, prefix + side * side, C) -> (N, C, side, side), without the class and register tokens; a view."""
    side = isqrt(x.shape[1] - prefix)
    return x[:, prefix:].transpose(1, 2).unflatten(2, (side, side))


def _resnet(net: nn.Module) -> Structure:
    children = [name for name, _ in net.named_children()]
    stages = [name for name in children if name.startswith("layer")]
    first, end = children.index(stages[0]), children.index(stages[-1]) + 1
    tail = children[end : children.index("global_pool")]
    return Structure(tuple(children[:first]), _stages(net, stages), tuple(tail), is_map)


def _regnet(net: nn.Module) -> Structure:
    return Structure(("stem",), _stages(net, ("s1", "s2", "s3", "s4")), ("final_conv",), is_map)


def _convnext(net: nn.Module) -> Structure:
    return Structure(("stem",), _downsampled_stages(net, "stages"), ("norm_pre",), is_map)


def _swin(net: nn.Module) -> Structure:
    return Structure(("patch_embed",), _downsampled_stages(net, "layers"), ("norm",), _from_channels_last)


def _efficientnet(net: nn.Module) -> Structure:
    return Structure(("conv_stem", "bn1"), _stages_by_resolution(net), ("conv_head", "bn2"), is_map)


def _mobilenet(net: nn.Module) -> Structure:
    """``conv_head`` comes after the pooling."""
    return Structure(("conv_stem", "bn1"), _stages_by_resolution(net), (), is_map)


def _densenet(net: nn.Module) -> Structure:
    """All layers of a dense block end in one concatenation, so the dense block is the smallest block."""
    names = [f"features.{name}" for name in _children(net, "features")]
    dense = [i for i, name in enumerate(names) if "denseblock" in name]
    stem, *transitions = [tuple(names[start + 1 : end]) for start, end in pairwise([-1, *dense])]
    before: list[tuple[str, ...]] = [(), *transitions]
    blocks = [Block(names[i], (*steps, names[i])) for i, steps in zip(dense, before, strict=True)]
    stages = tuple(Stage(block.name, (block,)) for block in blocks)
    return Structure(stem, stages, tuple(names[dense[-1] + 1 :]), is_map)


def _vision_transformer(net: nn.Module) -> Structure:
    """One resolution throughout, so a "stage" is a quarter of the blocks.

    Raises:
        UserError: patches are dropped in training, which leaves no map for heads to read.
    """
    if not isinstance(net.patch_drop, nn.Identity):
        raise UserError("network.args.patch_drop_rate: heads read the whole map, so no patch may be dropped")
    blocks = [Block(name, (name,)) for name in (f"blocks.{i}" for i in _children(net, "blocks"))]
    stages = [Stage(group[-1].name, tuple(group)) for group in evenly(blocks, 4)]
    prefix = cast(int, net.num_prefix_tokens)
    stem = ("patch_embed", "_pos_embed", "norm_pre")
    return Structure(stem, tuple(stages), ("norm",), partial(_from_tokens, prefix=prefix))


def evenly(blocks: Sequence[Block], groups: int) -> list[Sequence[Block]]:
    """Consecutive groups as equal as possible."""
    ends = [len(blocks) * i // groups for i in range(groups + 1)]
    return [blocks[start:end] for start, end in pairwise(ends)]


def _stages(net: nn.Module, names: Iterable[str]) -> tuple[Stage, ...]:
    """Stages whose children are the blocks."""
    return tuple(
        Stage(name, tuple(Block(f"{name}.{b}", (f"{name}.{b}",)) for b in _children(net, name)))
        for name in names
    )


def _downsampled_stages(net: nn.Module, path: str) -> tuple[Stage, ...]:
    """Stages of the form ``downsample``, ``blocks``; the first block begins with the former."""
    stages = []
    for name in (f"{path}.{i}" for i in _children(net, path)):
        first, *others = (f"{name}.blocks.{b}" for b in _children(net, f"{name}.blocks"))
        blocks = (Block(first, (f"{name}.downsample", first)), *(Block(other, (other,)) for other in others))
        stages.append(Stage(name, blocks))
    return tuple(stages)


def _stages_by_resolution(net: nn.Module) -> tuple[Stage, ...]:
    """Stages of ``blocks``, those of one resolution together under the name of the last."""
    reported = {info["module"] for info in net.feature_info}  # type: ignore[union-attr]
    stages: list[Stage] = []
    blocks: tuple[Block, ...] = ()
    for stage in _stages(net, [f"blocks.{i}" for i in _children(net, "blocks")]):
        blocks += stage.blocks
        if stage.name in reported:
            stages.append(Stage(stage.name, blocks))
            blocks = ()
    return tuple(stages)


def _children(net: nn.Module, path: str) -> list[str]:
    return [name for name, _ in net.get_submodule(path).named_children()]


_FAMILIES: dict[type[Any], Callable[[nn.Module], Structure]] = {
    ResNet: _resnet,
    ConvNet: _resnet,
    RegNet: _regnet,
    ConvNeXt: _convnext,
    SwinTransformer: _swin,
    EfficientNet: _efficientnet,
    MobileNetV3: _mobilenet,
    DenseNet: _densenet,
    VisionTransformer: _vision_transformer,
}
