"""InfoPro's reconstruction term, and how much it weighs at each depth, as in its code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework.data.batch import Batch
from framework.local.blocks import blocks_of
from framework.local.heads import WeightedHeads
from framework.local.resizing import ResizedConv
from framework.local.trunks import conv_bn_relu
from framework.local.units import Task
from framework.network import Shape
from framework.network.layers import initialize
from framework.runtime.errors import UserError

Pair = tuple[float, float]
Source = Literal[
    "auglocal", "cifar10", "cifar10_balanced", "stl10", "stl10_balanced", "svhn", "imagenet_balanced", "mlaan"
]

#: source -> blocks of the stages -> modules K -> (lambda1, lambda2) of the first module, of the last but one.
#: ``balanced`` are the splits called InfoPro*; the other rows of ResNet-32 on CIFAR-10 go with the contrast.
LAMBDAS: dict[Source, dict[tuple[int, ...], dict[int, tuple[Pair, Pair]]]] = {
    "auglocal": {
        (5, 5, 5): {16: ((5, 0.05), (0.2, 0.5))},
        (18, 18, 18): {55: ((5, 0), (0.5, 1))},
    },
    "cifar10": {
        (5, 5, 5): {
            2: ((5, 1), (0, 0)),
            4: ((6, 0), (1, 2)),
            8: ((5, 0), (0, 2)),
            16: ((5, 0.05), (0.2, 0.5)),
        },
        (18, 18, 18): {
            2: ((5, 0.5), (0, 0)),
            4: ((1, 0), (0, 1)),
            8: ((5, 0), (0, 1)),
            16: ((5, 0), (0.5, 1)),
        },
    },
    "cifar10_balanced": {(18, 18, 18): {2: ((5, 0.1), (0, 0)), 3: ((5, 0), (5, 0.1)), 4: ((5, 0), (5, 0.1))}},
    "stl10": {
        (18, 18, 18): {
            2: ((10, 1), (0, 0)),
            4: ((20, 0.2), (5, 2)),
            8: ((20, 0.2), (5, 1)),
            16: ((20, 0.5), (10, 0.1)),
        }
    },
    "stl10_balanced": {(18, 18, 18): {2: ((20, 1), (0, 0)), 3: ((20, 0.5), (5, 2)), 4: ((20, 0.5), (10, 1))}},
    "svhn": {
        (18, 18, 18): {
            2: ((1, 0.1), (0, 0)),
            4: ((5, 0), (0.5, 1)),
            8: ((5, 0), (0.5, 2)),
            16: ((5, 0.2), (0.5, 1)),
        }
    },
    "imagenet_balanced": {
        (3, 4, 23, 3): {2: ((5, 0.75), (0, 0))},
        (3, 8, 36, 3): {2: ((5, 1), (0, 0))},
    },
}
#: MLAAN's runs of InfoPro*, at every K
MLAAN: tuple[Pair, Pair] = ((5, 0.5), (0, 0))


@dataclass
class Reconstruction:
    """A decoder beside a head: lambda1 times its loss, lambda2 times the head's.

    Attributes:
        lambdas: where the lambdas come from; ``auglocal`` has them for K=16 and 55, and those of K=16 serve
            for all other networks, ``mlaan`` has the same for all.
        first: (lambda1, lambda2) of the first module, in place of those of ``lambdas``.
        last: the same for the last module but one; between them they are linear in the depth.
        lambda_index: depth in modules, or in stages as MLAAN's code has it.
        decoder: ``cifar`` has one hidden convolution at full resolution, ``imagenet`` three on the way there;
            ``auto`` takes the latter from 128 pixels on.
        patches: 1, or 4 for a decoder of its own on each quarter of the image (HPFF), whose losses add up.
    """

    lambdas: Source = "auglocal"
    first: Pair | None = None
    last: Pair | None = None
    lambda_index: Literal["module", "stage"] = "module"
    decoder: Literal["auto", "cifar", "imagenet"] = "auto"
    patches: Literal[1, 4] = 1

    def beside(self, head: nn.Module, task: Task, segment: int, shape: Shape) -> nn.Module | None:
        """Head and decoder on inputs of ``shape``, for module ``segment``; ``None`` if both lambdas are 0."""
        lambda1, lambda2 = self.weights(task, segment)
        parts = [(lambda1, self._decoder(shape, task))] if lambda1 > 0 else []
        parts += [(lambda2, head)] if lambda2 > 0 else []
        return WeightedHeads(parts) if parts else None

    def weights(self, task: Task, segment: int) -> Pair:
        """lambda1 and lambda2 of a module.

        Raises:
            UserError: ``lambdas`` has none for this network and K.
        """
        first, last = self._ends(task)
        depth, span = segment, len(task) - 2
        if self.lambda_index == "stage":
            depth = max((b.stage for b in blocks_of(task.segments) if b.segment <= segment), default=1)
        share = min(1.0, depth / span) if span > 0 else 0.0
        lambda1, lambda2 = (a * (1 - share) + b * share for a, b in zip(first, last, strict=True))
        return lambda1, lambda2

    def _ends(self, task: Task) -> tuple[Pair, Pair]:
        if self.first is not None and self.last is not None:
            return self.first, self.last
        first, last = MLAAN if self.lambdas == "mlaan" else self._listed(task)
        return self.first or first, self.last or last

    def _listed(self, task: Task) -> tuple[Pair, Pair]:
        if self.lambdas not in LAMBDAS:  # a recipe's is checked before
            raise UserError(f"lambdas={self.lambdas}: must be one of {', '.join((*LAMBDAS, 'mlaan'))}")
        blocks = blocks_of(task.segments)
        counts = tuple(sum(b.stage == s for b in blocks) for s in sorted({b.stage for b in blocks}))
        rows = LAMBDAS[self.lambdas].get(counts, {})
        modules = len(task) + (len(task) == len(blocks))  # the papers count the stem
        if modules in rows:
            return rows[modules]
        if self.lambdas == "auglocal":
            return LAMBDAS["auglocal"][5, 5, 5][16]
        possible = ", ".join(f"K={k} of {sum(c)} blocks" for c, r in LAMBDAS[self.lambdas].items() for k in r)
        raise UserError(
            f"reconstruction.lambdas={self.lambdas}: has no values for K={modules} of {len(blocks)} blocks, only for "
            f"{possible}; give first and last"
        )

    def _decoder(self, shape: Shape, task: Task) -> nn.Module:
        image = task.image
        large = self.decoder == "imagenet" or (self.decoder == "auto" and image.height >= 128)
        halves = 1 if self.patches == 1 else 2
        part = Shape(shape.channels, shape.height // halves, shape.width // halves)
        target = (image.height // halves, image.width // halves)
        trunks = [_trunk(part, target, large) for _ in range(self.patches)]
        return Decoder(trunks, task)


class Decoder(nn.Module):
    """Reconstructs the image; the loss is the binary cross entropy a value, of images scaled back to [0, 1].

    Args:
        trunks: map features to logits of the image, one for the whole or four for its quarters, row by row.
        task: for the images' normalization.
    """

    needs_images = True

    def __init__(self, trunks: Sequence[nn.Module], task: Task) -> None:
        super().__init__()
        self.trunks = nn.ModuleList(trunks)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(task.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(task.std).view(1, -1, 1, 1), persistent=False)
        initialize(self.trunks)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """Scalar loss of the segment output ``x`` (N, C, H, W)."""
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
