"""InfoPro's decoder: a head that reconstructs the images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework.data.batch import Batch
from framework.local.head import Head
from framework.local.needs import Need
from framework.local.resizing import ResizedConv
from framework.local.trunks import conv_bn_relu
from framework.local.units import NetworkInfo
from framework.network import Shape
from framework.network.layers import initialize


def build_decoder(network: NetworkInfo, shape: Shape, patches: int, large: bool) -> Decoder:
    """A decoder for inputs of ``shape``.

    Args:
        network: has the images' shape and normalization.
        shape: of the input.
        patches: 1, or 4 for a decoder of its own on each quarter of the image.
        large: three hidden convolutions on the way to full resolution, or one at full resolution.
    """
    parts = _areas(shape.height, shape.width, patches)
    targets = _areas(network.image.height, network.image.width, patches)
    trunks = [
        _trunk(Shape(shape.channels, *_size(part)), _size(target), large)
        for part, target in zip(parts, targets, strict=True)
    ]
    return Decoder(trunks, network)


class Decoder(Head):
    """Reconstructs the images; the loss is the mean binary cross entropy of their values, scaled back to [0, 1].

    Args:
        trunks: map features to logits of the image, one for the whole or four for its quarters, row by row.
        network: has the images' normalization.
    """

    needs = frozenset({Need.IMAGES})

    def __init__(self, trunks: Sequence[nn.Module], network: NetworkInfo) -> None:
        super().__init__()
        self.trunks = nn.ModuleList(trunks)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(network.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(network.std).view(1, -1, 1, 1), persistent=False)
        initialize(self.trunks)

    def loss(self, x: Tensor, batch: Batch) -> Tensor:
        image = (batch.images * self.std + self.mean).clamp(0, 1)
        pairs = zip(
            self.trunks, _patches(x, len(self.trunks)), _patches(image, len(self.trunks)), strict=True
        )
        losses = [_cross_entropy(trunk(features), target) for trunk, features, target in pairs]
        return torch.stack(losses).sum()


def _trunk(shape: Shape, target: tuple[int, int], large: bool) -> nn.Module:
    channels, *size = shape
    layers = conv_bn_relu(channels, 128, 1) if large else []
    channels, at = 128 if large else channels, (size[0], size[1])
    for out, part in ((32, 4), (12, 2)) if large else ((12, 1),):
        larger = (max(1, target[0] // part), max(1, target[1] // part))
        layers += [ResizedConv(channels, out, at, larger), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        channels, at = out, larger
    return nn.Sequential(*layers, ResizedConv(channels, 3, at, target, bias=True))


def _patches(x: Tensor, count: int) -> list[Tensor]:
    return [x[:, :, rows, columns] for rows, columns in _areas(x.shape[2], x.shape[3], count)]


def _areas(height: int, width: int, count: int) -> list[tuple[slice, slice]]:
    """The whole, or its quarters row by row; of an odd side the first half is longer, and one pixel is in both."""
    if count == 1:
        return [(slice(0, height), slice(0, width))]
    return [(rows, columns) for rows in _halves(height) for columns in _halves(width)]


def _halves(side: int) -> tuple[slice, slice]:
    first = (side + 1) // 2
    return slice(0, first), slice(min(first, side - 1), side)


def _size(area: tuple[slice, slice]) -> tuple[int, int]:
    rows, columns = area
    return rows.stop - rows.start, columns.stop - columns.start


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits.to(target.dtype), target)
