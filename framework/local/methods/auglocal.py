"""AugLocal (Ma et al. 2024): auxiliary networks built like some of the blocks that follow.

Windows: ``[i..i]`` for every segment i. Heads: new blocks, as wide as evenly spaced later ones, pooling and a linear
layer; the last segment has pooling and a linear layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from framework.config.schema import NonNegative, PositiveInt
from framework.local import LocalUnit, MethodOptions, NetworkInfo, Plan
from framework.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from framework.local.head import Head


@dataclass
class Options(MethodOptions):
    """The authors' command for ResNet-32; for ResNet-110 it has ``depth: 3``.

    Attributes:
        depth: d, blocks in the first auxiliary network.
        pyramid: 0 keeps the depth d, 1 lets it fall to 1 at the last segment but one (the paper's tau is 1 - that).
    """

    depth: PositiveInt = 2
    pyramid: NonNegative = 0.5


def plan(network: NetworkInfo, options: Options) -> Plan:
    """One unit a segment.

    Raises:
        UserError: a segment but the last is followed by no block.
    """
    n = len(network)
    depths = [auxiliary_depth(i, n, options) if i < n - 1 else 0 for i in range(n)]
    units = [LocalUnit(network.names[i], i, i, _head(network, i, depth)) for i, depth in enumerate(depths)]
    return Plan(tuple(units), n)


def auxiliary_depth(segment: int, segments: int, options: Options) -> int:
    """Blocks on top of a segment: falls linearly from ``depth``, at least 1."""
    fraction = options.pyramid * segment / max(1, segments - 2)
    return max(1, round(options.depth * (1 - fraction) + fraction))


def _head(network: NetworkInfo, segment: int, depth: int) -> Head:
    """The auxiliary network with ``depth`` blocks."""
    from torch import nn

    from framework.local.head import TrunkHead
    from framework.local.objectives import CrossEntropy
    from framework.network.layers import GlobalAveragePool

    blocks, channels = _sampled_blocks(network, segment, depth)
    norm = [nn.BatchNorm1d(channels)] if depth == 1 else []
    classifier, objective = nn.Linear(channels, network.num_classes), CrossEntropy(network.label_smoothing)
    return TrunkHead(nn.Sequential(*blocks, GlobalAveragePool(), *norm, classifier), objective)


def _sampled_blocks(network: NetworkInfo, segment: int, depth: int) -> tuple[list[nn.Module], int]:
    """New blocks as wide as ``depth`` evenly spaced later ones, and their output channels.

    Each doubling of the width halves the map.
    """
    from framework.local.trunks import residual_block

    later = [block for block in network.blocks if block.segment > segment]
    if depth and not later:
        name = network.names[segment]
        raise UserError(f"method: auglocal samples later blocks, and none follows segment {name}")
    steps, position = min(depth, len(later)), len(network.blocks) - len(later)
    layers: list[nn.Module] = []
    channels = network.shapes[segment].channels
    halvings = 0
    for i in range(1, steps + 1):
        block = network.blocks[round(position + len(later) * i / steps) - 1]
        out, original = block.channels, block.module(network.segments)
        halvings += max(0, (out // channels).bit_length() - 1)
        stride = 2 if halvings > 0 else 1
        halvings -= stride - 1
        layers.append(residual_block(channels, out, stride, not _is_basic(original) and out % 4 == 0))
        channels = out
    return layers, channels


def _is_basic(block: nn.Module) -> bool:
    """Whether its first convolution is a plain 3x3, as in a basic block; other kinds are stood for by a bottleneck."""
    from torch import nn

    convolutions = [module for module in block.modules() if isinstance(module, nn.Conv2d)]
    return bool(convolutions) and convolutions[0].kernel_size == (3, 3) and convolutions[0].groups == 1
