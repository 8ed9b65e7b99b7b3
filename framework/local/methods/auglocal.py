"""AugLocal (Ma et al. 2024): auxiliary networks built like some of the blocks that follow."""

from __future__ import annotations

from dataclasses import dataclass

from timm.models.resnet import Bottleneck
from torch import nn

from framework.config.schema import NonNegative, PositiveInt
from framework.local.blocks import blocks_of
from framework.local.heads import Head
from framework.local.objectives import CrossEntropy
from framework.local.trunks import residual_block
from framework.local.units import LocalUnit, Plan, Task
from framework.network import Shape
from framework.network.layers import GlobalAveragePool
from framework.runtime.errors import UserError


@dataclass
class Options:
    """The authors' command for ResNet-32; for ResNet-110 it has ``depth: 3``.

    Attributes:
        depth: d, blocks in the first auxiliary network.
        pyramid: how far the depth falls towards 1 at the last segment but one (the paper's tau is 1 - that).
    """

    depth: PositiveInt = 2
    pyramid: NonNegative = 0.5


def plan(task: Task, options: Options) -> Plan:
    """``[i..i]`` for every segment i; the last has pooling and a linear layer.

    Raises:
        UserError: the network has no residual blocks to sample from.
    """
    n = len(task)
    units = []
    for i in range(n):
        depth = auxiliary_depth(i, n, options) if i < n - 1 else 0
        layers, shape = _sampled_blocks(task, i, depth)
        norm = [nn.BatchNorm1d(shape.channels)] if depth == 1 else []
        trunk = nn.Sequential(
            *layers, GlobalAveragePool(), *norm, nn.Linear(shape.channels, task.num_classes)
        )
        units.append(LocalUnit(task.names[i], i, i, Head(trunk, CrossEntropy())))
    return Plan(tuple(units), n, supervised=True)


def auxiliary_depth(segment: int, segments: int, options: Options) -> int:
    """Blocks on top of a segment: falls linearly from ``depth``, at least 1."""
    share = options.pyramid * segment / max(1, segments - 2)
    return max(1, round(options.depth * (1 - share) + share))


def _sampled_blocks(task: Task, segment: int, depth: int) -> tuple[list[nn.Module], Shape]:
    """New blocks as wide as ``depth`` evenly spaced later ones; each doubling of the width halves the map."""
    blocks = blocks_of(task.segments)
    later = [b for b in blocks if b.segment > segment]
    if depth and not later:
        raise UserError(
            f"method: auglocal samples later blocks, and none follows segment {task.names[segment]}"
        )
    steps, position = min(depth, len(later)), len(blocks) - len(later)
    sampled = [blocks[round(position + len(later) * i / steps) - 1] for i in range(1, steps + 1)]
    layers: list[nn.Module] = []
    channels, height, width = task.shapes[segment]
    halvings = 0
    for block in sampled:
        out = block.channels(task.segments)
        halvings += (out // channels).bit_length() - 1
        stride = 2 if halvings > 0 else 1
        halvings -= stride - 1
        layers.append(
            residual_block(channels, out, stride, isinstance(block.module(task.segments), Bottleneck))
        )
        channels, height, width = out, -(-height // stride), -(-width // stride)
    return layers, Shape(channels, height, width)
