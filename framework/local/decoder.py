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
    halves = 1 if patches == 1 else 2
    part = Shape(shape.channels, shape.height // halves, shape.width // halves)
    target = (network.image.height // halves, network.image.width // halves)
    return Decoder([_trunk(part, target, large) for _ in range(patches)], network)


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
        larger = (target[0] // part, target[1] // part)
        layers += [ResizedConv(channels, out, at, larger), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        channels, at = out, larger
    return nn.Sequential(*layers, ResizedConv(channels, 3, at, target, bias=True))


def _patches(x: Tensor, count: int) -> list[Tensor]:
    if count == 1:
        return [x]
    return [quarter for half in x.chunk(2, 2) for quarter in half.chunk(2, 3)]


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits.to(target.dtype), target)
