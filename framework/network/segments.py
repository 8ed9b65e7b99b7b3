"""Cut a network into segments: the ordered pieces that local units are made of.

A segment holds no modules. It names children of the backbone and runs them in order, so parameter names stay those
of timm, and when a child is replaced (by SyncBatchNorm, for instance) the segment runs the new one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, reduce
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from framework.network.anatomy import has_class_token, reported
from framework.network.glue import Calls, Glue
from framework.network.layouts import FromTokens, ToMap, is_map
from framework.network.partitions import PUBLISHED
from framework.network.structure import Block, Stage, Steps, Structure, evenly, structure
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
        parts: stem, blocks and tail, as far as they are in it: children of the backbone by their dotted names, and
            what stands between them.
        to_map: from this segment's output to a map (N, C, H, W).
        stages: the network's, for heads that copy blocks of other segments.
        blocks: names of the blocks in it.
        final: whether the network's features are its output.
        follows: names of parameters that none of the network's segments use.
    """

    def __init__(
        self,
        backbone: nn.Module,
        name: str,
        parts: Sequence[Steps],
        to_map: ToMap = is_map,
        stages: tuple[Stage, ...] = (),
        blocks: tuple[str, ...] = (),
        final: bool = False,
        follows: tuple[str, ...] = (),
    ) -> None:
        self.backbone, self.name, self.to_map = backbone, name, to_map
        self.parts = tuple(part for part in parts if any(part))
        self.steps = steps = reduce(Steps.then, parts, Steps())
        self.stages, self.blocks, self.final, self.follows = stages, blocks, final, follows
        self._one = steps.training == steps.evaluation

    def __call__(self, x: Tensor) -> Tensor:
        """Map the previous segment's output, or the images (N, 3, H, W), to this segment's output.

        The output has the network's own layout, tokens (N, L, C) for instance; ``to_map`` makes it a map.
        """
        for step in self.steps.training if self._one or self.training else self.steps.evaluation:
            x = step(self.backbone, x) if isinstance(step, Calls) else self.backbone.get_submodule(step)(x)
        return x

    def __repr__(self) -> str:
        return f"Segment({self.name}: {', '.join(self.paths)})"

    @property
    def paths(self) -> tuple[str, ...]:
        """Dotted names of the children that run in training, in order."""
        steps = self.steps.training
        return tuple(p for step in steps for p in (step.paths if isinstance(step, Calls) else (step,)))

    @cached_property
    def own(self) -> tuple[str, ...]:
        """Dotted names of tensors that what stands between children uses (class token ...)."""
        calls = [step for mode in self.steps for step in mode if isinstance(step, Calls)]
        return tuple(dict.fromkeys(name for step in calls for name in step.own))

    @property
    def training(self) -> bool:
        """Whether any of its children is in training mode."""
        modules = self.modules()
        return any(module.training for module in modules) if modules else self.backbone.training

    @property
    def prefix(self) -> int | None:
        """Class and register tokens before the patches in its output; ``None`` where that is no sequence of tokens."""
        return self.to_map.prefix if isinstance(self.to_map, FromTokens) else None

    @property
    def has_class_token(self) -> bool:
        """Whether the first token of its output is a class token."""
        return bool(self.prefix) and has_class_token(self.backbone)

    def pieces(self) -> tuple[Segment, ...]:
        """Segments of stem, each block, and tail, which run one after the other are this one."""
        return tuple(Segment(self.backbone, self.name, [part]) for part in self.parts)

    def runs(self, training: bool) -> list[nn.Module]:
        """What it runs in order, in this mode."""
        steps = self.steps.training if training else self.steps.evaluation
        backbone = self.backbone
        return [Glue(backbone, s) if isinstance(s, Calls) else backbone.get_submodule(s) for s in steps]

    def modules(self) -> list[nn.Module]:
        """The children that it runs, in either mode, in order."""
        return [self.backbone.get_submodule(path) for path in self.every_path]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Trainable parameters, each once."""
        yield from (p for p in self.weights() if p.requires_grad)

    def weights(self) -> list[nn.Parameter]:
        """All parameters, each once."""
        own = [tensor for name in self.own if isinstance(tensor := self.tensor(name), nn.Parameter)]
        inside = (p for module in self.modules() for p in module.parameters())
        return list(dict.fromkeys([*inside, *own]))

    def tensor(self, name: str) -> Tensor:
        """One of ``own``."""
        path, _, last = name.rpartition(".")
        found = getattr(self.backbone.get_submodule(path), last)
        assert isinstance(found, Tensor)
        return found

    @cached_property
    def every_path(self) -> tuple[str, ...]:
        steps = [*self.steps.training, *self.steps.evaluation]
        paths = (p for step in steps for p in (step.paths if isinstance(step, Calls) else (step,)))
        return tuple(dict.fromkeys(paths))


def cut(
    backbone: nn.Module, at: Cut = "stage", stem_as_module: bool = False, image_size: int | None = None
) -> list[Segment]:
    """Cut a network into segments, which run in order equal its ``forward_features``.

    Parameters that ``forward_features`` does not use (the norm after ConvNeXt's pooling, the convolution after
    MobileNetV3's) are frozen: no local unit could train them.

    Args:
        backbone: a timm network, or any module that maps images to one tensor.
        at: ``"stage"`` gives one segment a downsampling stage (LoCo), ``"block"`` one a block (MLAAN). A
            number K gives K segments: the published partition, or else groups of blocks as even as possible.
            A list names the block or stage that ends each segment. What follows the last block joins it.
        stem_as_module: the stem is a segment of its own and counts in K (InfoPro and DGL at K=16 or 55).
            Otherwise it is part of the first segment; a K of one more than there are blocks then still gives one
            segment a block, because MLAAN's paper counts the stem (ResNet-32 has 15 blocks; K=16 gives 15 segments).
        image_size: side of the images in pixels, which some networks are cut for; ``None`` tries some sizes.

    Raises:
        UserError: the network can't be cut, or not there or into so many; says what is possible.
    """
    if image_size is not None:
        _check_size(backbone, image_size)
    parts = structure(backbone, image_size)
    groups = _groups(parts, at, stem_as_module)
    segments = []
    if stem_as_module:
        segments.append(Segment(backbone, "stem", [parts.stem], parts.stem_map, parts.stages))
    for i, group in enumerate(groups):
        first, last = i == 0 and not stem_as_module, i == len(groups) - 1
        of_blocks = [block.steps for block in group.blocks]
        own = [*([parts.stem] * first), *of_blocks, *([parts.tail] * last)]
        to_map = parts.to_map if last else group.blocks[-1].to_map
        names = tuple(block.name for block in group.blocks)
        segments.append(Segment(backbone, group.name, own, to_map, parts.stages, names, final=last))
    segments[-1].follows = _frozen_behind(backbone, segments)
    return segments


def _frozen_behind(backbone: nn.Module, segments: Sequence[Segment]) -> tuple[str, ...]:
    """Freeze the children that no step names, and check that everything else that trains is in a segment.

    Returns:
        The names of their parameters.
    """
    follows = []
    inside = {p for segment in segments for p in segment.parameters()}
    used = {path.partition(".")[0] for segment in segments for path in (*segment.every_path, *segment.own)}
    for name, parameter in backbone.named_parameters():
        if name.partition(".")[0] not in used:
            parameter.requires_grad_(False)
            follows.append(name)
        elif parameter.requires_grad and parameter not in inside:
            raise UserError(
                f"{type(backbone).__name__} can't be cut: parameter {name} is in none of its blocks"
            )
    return tuple(follows)


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


def _check_size(backbone: nn.Module, image_size: int) -> None:
    reduction = max((info["reduction"] for info in reported(backbone)), default=1)
    if image_size <= reduction // 2:
        raise UserError(
            f"data.image_size={image_size}: too small for {type(backbone).__name__}, which downsamples by "
            f"{reduction}; must be at least {reduction // 2 + 1}"
        )


def output_shapes(segments: Sequence[Segment], image_size: int) -> tuple[Shape, ...]:
    """Shape of the map at every segment's output for square images.

    Raises:
        UserError: as ``outputs``.
    """
    return tuple(shape for shape, _ in outputs(segments, image_size))


@torch.no_grad()
def outputs(segments: Sequence[Segment], image_size: int) -> list[tuple[Shape, tuple[int, ...]]]:
    """Every segment's output for square images, as a map and as it is, by running one image in evaluation mode.

    Raises:
        UserError: the image is too small for the network's downsampling, or not of the one size it takes.
    """
    backbone = segments[0].backbone
    _check_size(backbone, image_size)
    training = [m for m in backbone.modules() if m.training]
    parameter = next(backbone.parameters())
    x = torch.zeros(1, 3, image_size, image_size, device=parameter.device, dtype=parameter.dtype)
    backbone.eval()
    shapes = []
    try:
        for segment in segments:
            x = segment(x)
            shapes.append((Shape(*segment.to_map(x).shape[1:]), tuple(x.shape[1:])))
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
    return shapes
