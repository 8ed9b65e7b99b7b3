"""Cut a network into segments: the ordered pieces that local units are made of.

A segment holds no modules. It names children of the backbone and runs them in order, so parameter names stay those
of timm, and when a child is replaced (by SyncBatchNorm, for instance) the segment runs the new one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from framework.network.partitions import PUBLISHED
from framework.network.structure import Block, Stage, Structure, ToMap, evenly, is_map, structure
from framework.runtime.errors import UserError

Cut = str | int | Sequence[str]


class Shape(NamedTuple):
    """Size of one image's activation: channels, height, width."""

    channels: int
    height: int
    width: int


class Segment:
    """Consecutive steps of ``backbone``, run one after the other.

    Args:
        backbone: the whole network.
        name: what tables and metrics call the segment (``"layer2"``, ``"layer2.0"``).
        paths: dotted names, in order, of children or methods of the backbone.
        to_map: from this segment's output to a map (N, C, H, W).
        own: parameters of the backbone itself that the methods in ``paths`` use (class token ...).
    """

    def __init__(
        self,
        backbone: nn.Module,
        name: str,
        paths: tuple[str, ...],
        to_map: ToMap = is_map,
        own: tuple[str, ...] = (),
    ) -> None:
        self.backbone, self.name, self.paths, self.to_map, self.own = backbone, name, paths, to_map, own

    def __call__(self, x: Tensor) -> Tensor:
        """Map the previous segment's output, or the images (N, 3, H, W), to this segment's output.

        The output has the network's own layout, tokens (N, L, C) for instance; ``to_map`` makes it a map.
        """
        for path in self.paths:
            x = attrgetter(path)(self.backbone)(x)
        return x

    def __repr__(self) -> str:
        return f"Segment({self.name}: {', '.join(self.paths)})"

    def modules(self) -> list[nn.Module]:
        """The children in order; a step that is a method of the backbone is not among them."""
        steps = (attrgetter(path)(self.backbone) for path in self.paths)
        return [step for step in steps if isinstance(step, nn.Module)]

    def check_maps(self) -> None:
        """Raises:
        UserError: the segment does not work on maps (N, C, H, W), so that no head can run a copy of it.
        """
        if self.to_map is not is_map:
            network = type(self.backbone).__name__
            raise UserError(f"no head can copy blocks of {network}: they do not work on maps (N, C, H, W)")

    def parameters(self) -> Iterator[nn.Parameter]:
        """Trainable parameters, each once."""
        for module in self.modules():
            yield from (p for p in module.parameters() if p.requires_grad)
        own = (self.backbone.get_parameter(name) for name in self.own)
        yield from (p for p in own if p.requires_grad)


def cut(backbone: nn.Module, at: Cut = "stage", stem_as_module: bool = False) -> list[Segment]:
    """Cut a network into segments, which run in order equal its ``forward_features``.

    Children that only ``forward_head`` uses (the norm after ConvNeXt's pooling, the convolution after
    MobileNetV3's) are frozen: no local unit could train them.

    Args:
        backbone: a network of a family in ``structure``.
        at: ``"stage"`` gives one segment a downsampling stage (LoCo), ``"block"`` one a block (MLAAN). A
            number K gives K segments: the published partition, or else groups of blocks as even as possible.
            A list names the block or stage that ends each segment. What follows the last block joins it.
        stem_as_module: the stem is a segment of its own and counts in K (InfoPro and DGL at K=16 or 55).
            Otherwise it is part of the first segment; a K of one more than there are blocks then still gives one
            segment a block, because MLAAN's paper counts the stem (ResNet-32 has 15 blocks; K=16 gives 15 segments).

    Raises:
        UserError: the network can't be cut, or not there or into so many; says what is possible.
    """
    parts = structure(backbone)
    groups = _groups(parts, at, stem_as_module)
    paths = [[step for block in stage.blocks for step in block.steps] for stage in groups]
    names = [stage.name for stage in groups]
    if stem_as_module:
        names.insert(0, "stem")
        paths.insert(0, [])
    paths[0][:0] = parts.stem
    paths[-1] += parts.tail
    own = tuple(name for name, _ in backbone.named_parameters(recurse=False))
    segments = [
        Segment(backbone, name, tuple(steps), parts.to_map, own if i == 0 else ())
        for i, (name, steps) in enumerate(zip(names, paths, strict=True))
    ]
    _freeze_what_follows(backbone, segments)
    return segments


def _freeze_what_follows(backbone: nn.Module, segments: Sequence[Segment]) -> None:
    """Freeze the children that no step names, and check that everything else that trains is in a segment."""
    inside = {p for segment in segments for p in segment.parameters()}
    used = {path.partition(".")[0] for segment in segments for path in (*segment.paths, *segment.own)}
    for name, parameter in backbone.named_parameters():
        if name.partition(".")[0] not in used:
            parameter.requires_grad_(False)
        elif parameter.requires_grad and parameter not in inside:
            raise UserError(
                f"{type(backbone).__name__} can't be cut: parameter {name} is in none of its blocks"
            )


def _groups(parts: Structure, at: Cut, stem_as_module: bool) -> Sequence[Stage]:
    blocks = [block for stage in parts.stages for block in stage.blocks]
    if at == "stage":
        return parts.stages
    if at == "block":
        return [Stage(block.name, (block,)) for block in blocks]
    if isinstance(at, str):
        raise UserError(
            f"network.cut={at!r}: a network is cut at stage or block, into a number of modules, or after "
            "the blocks of a list"
        )
    groups = _modules(parts, blocks, at, stem_as_module) if isinstance(at, int) else _after(parts, blocks, at)
    return [Stage(group[-1].name, tuple(group)) for group in groups]


def _modules(
    parts: Structure, blocks: list[Block], k: int, stem_as_module: bool
) -> Sequence[Sequence[Block]]:
    """``k`` modules, the stem included or not."""
    groups = k - 1 if stem_as_module or k == len(blocks) + 1 else k
    if not 1 <= groups <= len(blocks):
        n = len(blocks)
        possible = f"2 to {n + 1}" if stem_as_module else f"1 to {n} (or {n + 1}, counting the stem)"
        raise UserError(f"network.cut={k}: the network has {n} blocks, so {possible} modules are possible")
    published = PUBLISHED.get(tuple(len(stage.blocks) for stage in parts.stages), {})
    if stem_as_module or groups not in published:
        return evenly(blocks, groups)
    return _after(parts, blocks, [parts.stages[s - 1].blocks[b].name for s, b in published[groups]])


def _after(parts: Structure, blocks: list[Block], ends: Sequence[str]) -> Sequence[Sequence[Block]]:
    """Groups that end with the blocks, or the last blocks of the stages, named."""
    position = {stage.name: stage.blocks[-1].name for stage in parts.stages}
    order = {block.name: i + 1 for i, block in enumerate(blocks)}
    for end in ends:
        if end not in order and end not in position:
            known = ", ".join(stage.name for stage in parts.stages)
            raise UserError(
                f"network.cut: no block {end}; blocks are called {blocks[0].name} to {blocks[-1].name}, "
                f"stages {known}"
            )
    stops = [order[position.get(end, end)] for end in ends]
    if stops != sorted(set(stops)) or not stops or stops[-1] != len(blocks):
        raise UserError(
            f"network.cut={list(ends)}: must be in the network's order and end with {blocks[-1].name}"
        )
    return [blocks[start:stop] for start, stop in pairwise([0, *stops])]


@torch.no_grad()
def output_shapes(segments: Sequence[Segment], image_size: int) -> tuple[Shape, ...]:
    """Shape of the map at every segment's output for square images, by running one image in evaluation mode.

    Raises:
        UserError: the image is too small for the network's downsampling, or not of the one size it takes.
    """
    backbone = segments[0].backbone
    reduction = max((info["reduction"] for info in getattr(backbone, "feature_info", [])), default=1)
    if image_size <= reduction // 2:
        raise UserError(
            f"data.image_size={image_size}: too small for {type(backbone).__name__}, which downsamples by "
            f"{reduction}; must be at least {reduction // 2 + 1}"
        )
    training = [m for m in backbone.modules() if m.training]
    parameter = next(backbone.parameters())
    x = torch.zeros(1, 3, image_size, image_size, device=parameter.device, dtype=parameter.dtype)
    backbone.eval()
    shapes = []
    try:
        for segment in segments:
            x = segment(x)
            shapes.append(Shape(*segment.to_map(x).shape[1:]))
    except AssertionError as error:  # timm's transformers have a size
        raise UserError(
            f"data.image_size={image_size}: {error} Set network.args.img_size={image_size}."
        ) from error
    except RuntimeError as error:
        raise UserError(
            f"data.image_size={image_size} is too small for segment {segment.name}: {error}"
        ) from error
    finally:
        for module in training:
            module.training = True
    return tuple(shapes)
