"""What a network is made of: stem, blocks grouped in stages, tail; found by recording what it computes.

Blocks are the numbered children of its lists and stages (``layer2.0``, ``blocks.3``); what stands before a block, such
as a downsampling, belongs to it. One segment may end where another begins only if one tensor passes between them, which
nothing changes in place afterwards, whose layout is known, and no parameter serves on both sides. Training and
evaluation are recorded apart, and may differ. Where two tensors pass between all blocks, they are packed into one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from timm.layers import PatchDropout
from torch import Tensor, nn
from torch.jit import ScriptModule

from framework.network import anatomy
from framework.network.chain import Step
from framework.network.layouts import ToMap, is_map
from framework.network.pieces import Opened, Pieces, Rule, chain_of, steps
from framework.network.records import Trace
from framework.network.tracing import Untraceable, trace
from framework.runtime.errors import UserError

BLOCKS = Rule(anatomy.is_block, lambda name, module: anatomy.is_sequence(module))
LAYERS = Rule(anatomy.is_layer, lambda name, module: anatomy.is_composite(module))

#: sides of images that are tried where nobody says which the network takes
SIDES = (224, 256, 64, 32, 384, 448, 128, 96, 192, 288, 320, 512)


class Steps(NamedTuple):
    """What runs in order, in training and in evaluation."""

    training: tuple[Step, ...] = ()
    evaluation: tuple[Step, ...] = ()

    def then(self, other: Steps) -> Steps:
        """Both in order."""
        return Steps(self.training + other.training, self.evaluation + other.evaluation)


class Block(NamedTuple):
    """The smallest piece that a cut may leave whole.

    Attributes:
        name: dotted, of the last of the network's blocks in it.
        steps: what it runs.
        to_map: turns its output into the map (N, C, H, W) that heads read.
        channels: of that map.
    """

    name: str
    steps: Steps
    to_map: ToMap
    channels: int


class Stage(NamedTuple):
    """Blocks that belong together, at one resolution as a rule."""

    name: str
    blocks: tuple[Block, ...]


class Structure(NamedTuple):
    """Steps of ``forward_features``, in order.

    Attributes:
        stem: before the first block.
        stem_map: turns its output into a map.
        stages: the blocks.
        tail: after the last block.
        to_map: turns its output into a map.
    """

    stem: Steps
    stem_map: ToMap
    stages: tuple[Stage, ...]
    tail: Steps
    to_map: ToMap


def structure(network: nn.Module, image_size: int | None = None) -> Structure:
    """Stem, stages and tail of a network.

    Args:
        network: any, whose ``forward_features``, or else ``forward``, maps images to one tensor.
        image_size: side of the images; ``None`` tries some.

    Raises:
        UserError: it can't be cut; says why.
    """
    if any(isinstance(module, PatchDropout) and module.prob > 0 for module in network.modules()):
        raise UserError("network.args.patch_drop_rate: heads read the whole map, so no patch may be dropped")
    name = type(network).__name__
    if not any(True for _ in network.parameters()):
        raise UserError(f"{name} can't be cut into segments: it has no parameters")
    for path, module in network.named_modules():
        if isinstance(module, ScriptModule):
            raise UserError(f"{name} can't be cut into segments: {path or name} is compiled by torch.jit")
    try:
        return _found(network, image_size)
    except Untraceable as error:
        if image_size is not None:
            structure(network)  # fails if it is not for the size
            hint = (
                f" Set network.args.img_size={image_size}."
                if isinstance(error.__cause__, AssertionError) and "divisible" not in str(error)
                else ""
            )
            raise UserError(
                f"data.image_size={image_size}: {name} takes no such images: {error}{hint}"
            ) from error
        fails = (
            ""
            if error.__cause__ is None
            else "its code fails on images of three channels, or can't be recorded: "
        )
        raise UserError(f"{name} can't be cut into segments: {fails}{error}") from error


def _found(network: nn.Module, image_size: int | None) -> Structure:
    """The structure by numbered blocks; else by single layers; else by blocks between which two tensors pass."""
    modes, side = _modes(network, image_size, BLOCKS)
    if all(len(mode.cuts) >= 2 for mode in modes):
        return _structure(*modes)
    # Positions don't depend on the images, which shows inside the modules that return them beside tokens.
    several = {name for mode in modes for name in mode.chain.trace.several()}
    pairs = Rule(anatomy.is_block, lambda n, module: anatomy.is_sequence(module) or n in several, tensors=2)
    failed: list[Untraceable] = []
    for rule in (LAYERS, pairs):
        try:
            return _structure(*_modes(network, side, rule)[0])
        except Untraceable as error:
            failed.append(error)
    raise failed[0]


def _modes(network: nn.Module, image_size: int | None, rule: Rule) -> tuple[tuple[Pieces, Pieces], int]:
    """The network in training and in evaluation, and the side of the images that were recorded."""
    training, side = _recorded(network, image_size, rule.opened)
    evaluation = _record(network, side, False, rule.opened)
    larger = _larger(network, side, evaluation, False, rule.opened)
    same = _calls(training) == _calls(evaluation) and training.shapes == evaluation.shapes
    of_training = larger if same else _larger(network, side, training, True, rule.opened)
    both = ((training, of_training), (evaluation, larger))
    pieces = [Pieces(chain_of(network, found, rule), large) for found, large in both]
    return (pieces[0], pieces[1]), side


def image_side(network: nn.Module, sides: Sequence[int]) -> int:
    """The first of these sides of images with which the network can be cut.

    Raises:
        UserError: there is none; says why.
    """
    failed: UserError | None = None
    for side in sides:
        try:
            _record(network, side, True, BLOCKS.opened)
            structure(network, side)
        except Untraceable:
            continue
        except UserError as error:
            failed = error
        else:
            return side
    if failed is None:
        structure(network)  # fails if it can't be cut for any size
        failed = UserError(
            f"{type(network).__name__} takes no images with a side of {sides[0]} to {sides[-1]}"
        )
    raise failed


def run_features(network: nn.Module, images: Tensor) -> Any:
    """What is cut: timm's ``forward_features``; of any other network the whole."""
    features: Callable[[Tensor], Any] = getattr(network, "forward_features", network)
    return features(images)


def _recorded(network: nn.Module, image_size: int | None, opened: Opened) -> tuple[Trace, int]:
    """The network in training, and the side of the images that it takes."""
    if image_size is not None:
        return _record(network, image_size, True, opened), image_size
    config = getattr(network, "pretrained_cfg", None) or {}
    first: Untraceable | None = None
    for side in dict.fromkeys((config.get("input_size", (3, 224))[1], *SIDES)):
        try:
            return _record(network, side, True, opened), side
        except Untraceable as error:
            first = first or error
    assert first is not None
    raise first


def _record(network: nn.Module, side: int, training: bool, opened: Opened) -> Trace:
    return trace(network, run_features, (3, side, side), training, opened)


def _calls(found: Trace) -> list[tuple[str, object]]:
    return [(node.kind, node.target) for node in found.nodes]


def _larger(network: nn.Module, side: int, small: Trace, training: bool, opened: Opened) -> Trace | None:
    """The network for larger images; ``None`` if it takes none, or all its tensors are plain maps."""
    plain = (len(shape) == 4 and shape[1] != shape[2] == shape[3] for shape in small.shapes.values())
    if all(plain):
        return None
    try:
        large = _record(network, 2 * side, training, opened)
    except Untraceable:
        return None
    return large if _calls(large) == _calls(small) and large.shapes.keys() == small.shapes.keys() else None


def _structure(training: Pieces, evaluation: Pieces) -> Structure:
    both_modes = [name for name in training.cuts if name in evaluation.cuts]
    names = [
        n for n in both_modes if training.shapes(training.cuts[n]) == evaluation.shapes(evaluation.cuts[n])
    ]
    if not names or (len(names) == 1 and anatomy.has_blocks(training.network)):
        raise Untraceable(
            "more than two tensors pass between its blocks, or one of unknown layout, or they share parameters"
        )
    both = []
    for mode in (training, evaluation):
        end = len(mode.chain.items)
        start = mode.stem if training.stem and evaluation.stem else 0
        both.append(steps(mode.chain, [0, start, *(mode.cuts[name] for name in names), end]))
    stem, *middle, tail = (Steps(*pair) for pair in zip(*both, strict=True))
    blocks = []
    for name, own in zip(names, middle, strict=True):
        place = evaluation.cuts[name]
        to_map = evaluation.to_map(place)
        assert to_map is not None
        channels = to_map(_meta(evaluation.shape(place))).shape[1]
        blocks.append(Block(name, own, to_map, channels))
    stem_map = evaluation.to_map(evaluation.stem) or is_map
    return Structure(
        stem, stem_map, _stages(evaluation, names, blocks), tail, _features_map(evaluation, blocks[-1])
    )


def _features_map(pieces: Pieces, last: Block) -> ToMap:
    """How the features become a map: as their layout tells, or as the last block's do, if they are of one rank."""
    end = len(pieces.chain.items)
    found, shape = pieces.to_map(end), pieces.shape(end)
    if found is None and len(shape) != len(pieces.shape(pieces.cuts[last.name])):
        raise Untraceable(
            f"its features have shape {shape}, and must be maps (N, C, H, W), tokens (N, L, C) or vectors (N, D)"
        )
    return found or last.to_map


def _meta(shape: tuple[int, ...]) -> Tensor:
    from torch import empty

    return empty(shape, device="meta")


def _stages(pieces: Pieces, names: list[str], blocks: Sequence[Block]) -> tuple[Stage, ...]:
    """As the network reports its stages, or by the modules that hold the blocks, or four of equal size."""
    ends = anatomy.stage_ends(pieces.network, pieces.names, [pieces.names.index(name) for name in names])
    ends = anatomy.parents(names) if ends is None else ends
    if not ends:
        return tuple(Stage(group[-1].name, tuple(group)) for group in evenly(blocks, min(4, len(blocks))))
    starts = [0, *(number + 1 for _, number in ends)]
    return tuple(
        Stage(name, tuple(blocks[start : number + 1]))
        for (name, number), start in zip(ends, starts, strict=False)
    )


def evenly(blocks: Sequence[Block], groups: int) -> list[Sequence[Block]]:
    """Consecutive groups as equal as possible."""
    ends = [len(blocks) * i // groups for i in range(groups + 1)]
    return [blocks[start:end] for start, end in pairwise(ends)]
