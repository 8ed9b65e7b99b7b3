"""Heads: the auxiliary networks on top of windows.

A head is a trunk and an objective, exchangeable independently of each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from timm.models.resnet import Bottleneck, downsample_conv
from torch import Tensor, nn

from framework.batch import Batch
from framework.errors import UserError
from framework.local.objectives import CrossEntropy, InfoNCE
from framework.network import Shape
from framework.network.layers import GlobalAveragePool, initialise

MLP_BN = ("none", "hidden", "all")


class Head(nn.Module):
    """``objective(trunk(x), batch)``.

    Args:
        trunk: maps a segment's output (N, C, H, W) to logits or embeddings (N, D).
        objective: maps those and the batch to a scalar loss.
    """

    def __init__(self, trunk: nn.Module, objective: nn.Module) -> None:
        super().__init__()
        self.trunk, self.objective = trunk, objective
        initialise(self.trunk)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """Scalar loss on the segment output ``x`` (N, C, H, W)."""
        return self.objective(self.trunk(x), batch)

    def predict(self, x: Tensor) -> Tensor:
        """The trunk's output (N, D): logits of a classifier, the embedding of a contrastive head."""
        return self.trunk(x)


@dataclass
class Projection:
    """Decoder of a contrastive unit: residual blocks, pooling, MLP, InfoNCE (LoCo section 3.3).

    Attributes:
        conv_blocks: residual convolution blocks before the pooling; the first has stride 2.
        layers: linear layers of the MLP; 1 is a plain linear map.
        hidden: width of the hidden layers; ``None`` means the channels that enter the pooling.
        dim: size of the embedding.
        bn: BatchNorm after no layer, after the hidden ones, or after all.
        temperature: tau of InfoNCE.
    """

    conv_blocks: int = 0
    layers: int = 2
    hidden: int | None = None
    dim: int = 128
    bn: str = "hidden"
    temperature: float = 0.1

    def build(self, shape: Shape) -> Head:
        """A head for segment outputs of ``shape``.

        Raises:
            UserError: ``bn`` or ``layers`` out of range.
        """
        if self.bn not in MLP_BN or self.layers < 1:
            raise UserError(
                f"method.head: bn={self.bn} must be one of {', '.join(MLP_BN)}, layers={self.layers} at least 1"
            )
        blocks = [decoder_block(shape.channels, stride=2 if i == 0 else 1) for i in range(self.conv_blocks)]
        widths = [shape.channels] + [self.hidden or shape.channels] * (self.layers - 1) + [self.dim]
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(widths)):
            last = i == self.layers - 1
            normed = self.bn == "all" or (self.bn == "hidden" and not last)
            layers.append(nn.Linear(a, b, bias=not normed))
            layers += [nn.BatchNorm1d(b)] if normed else []
            layers += [] if last else [nn.ReLU(inplace=True)]
        return Head(nn.Sequential(*blocks, GlobalAveragePool(), *layers), InfoNCE(self.temperature))


def decoder_block(channels: int, stride: int) -> nn.Module:
    """LoCo's residual block C -> C/4 -> C/4 (3x3, ``stride``) -> C, projection shortcut (FACTS L2)."""
    shortcut = downsample_conv(channels, channels, kernel_size=1, stride=stride) if stride > 1 else None
    return Bottleneck(channels, channels // 4, stride=stride, downsample=shortcut)


@dataclass
class Classifier:
    """Auxiliary classifier of a supervised unit.

    Attributes:
        kind: ``linear`` pooling and one linear layer; ``mlp_sr`` DGL's head as published, ``mlp_sr_auglocal``
            the version that AugLocal measured; ``1c2f`` InfoPro's one convolution and two linear layers.
    """

    kind: str = "linear"

    def build(self, shape: Shape, num_classes: int) -> Head:
        """A head for segment outputs of ``shape``.

        Raises:
            UserError: there is no such kind.
        """
        if self.kind not in _CLASSIFIERS:
            raise UserError(f"method.head.kind={self.kind}: must be one of {', '.join(_CLASSIFIERS)}")
        return Head(_CLASSIFIERS[self.kind](shape, num_classes), CrossEntropy())


def linear_classifier(shape: Shape, num_classes: int) -> nn.Module:
    """Global average pooling and one linear layer."""
    return nn.Sequential(GlobalAveragePool(), nn.Linear(shape.channels, num_classes))


def mlp_sr(shape: Shape, num_classes: int, hidden_layers: int = 3, bias: bool = True) -> nn.Module:
    """DGL's MLP-SR-aux: a quarter of the resolution, three 1x1 convolutions, 2x2 pooling, MLP (FACTS E2)."""
    c = shape.channels
    convolutions: list[nn.Module] = []
    for _ in range(3):
        convolutions += [nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU(inplace=True)]
    hidden: list[nn.Module] = []
    for _ in range(hidden_layers):
        hidden += [nn.Linear(4 * c, 4 * c, bias=bias), nn.BatchNorm1d(4 * c), nn.ReLU(inplace=True)]
    quarter = (-(-shape.height // 4), -(-shape.width // 4))
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(quarter),
        *convolutions,
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        *hidden,
        nn.Linear(4 * c, num_classes),
    )


def mlp_sr_auglocal(shape: Shape, num_classes: int) -> nn.Module:
    """MLP-SR-aux with two hidden layers without bias, behind the DGL numbers of later papers (FACTS E2)."""
    return mlp_sr(shape, num_classes, hidden_layers=2, bias=False)


def one_conv_two_fc(shape: Shape, num_classes: int) -> nn.Module:
    """InfoPro's 1c2f: 3x3 convolution to twice the channels at stride 2 (64 channels keep both), 128-d MLP."""
    out, stride = (shape.channels, 1) if shape.channels >= 64 else (2 * shape.channels, 2)
    return nn.Sequential(
        nn.Conv2d(shape.channels, out, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(inplace=True),
        GlobalAveragePool(),
        nn.Linear(out, 128),
        nn.ReLU(inplace=True),
        nn.Linear(128, num_classes),
    )


_CLASSIFIERS = {
    "linear": linear_classifier,
    "mlp_sr": mlp_sr,
    "mlp_sr_auglocal": mlp_sr_auglocal,
    "1c2f": one_conv_two_fc,
}
