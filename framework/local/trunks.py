"""Auxiliary networks without their objective: maps (N, C, H, W) to logits or embeddings (N, D).

They follow the authors' code: github.com/eugenium/DGL, blackfeather-wang/InfoPro-Pytorch, ChenxiangMA/AugLocal and
Wendy231015/MLAAN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from timm.models.resnet import BasicBlock, Bottleneck, downsample_conv
from torch import nn

from framework.network import Shape
from framework.network.layers import GlobalAveragePool
from framework.runtime.errors import UserError


def conv_bn_relu(channels: int, out: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """Convolution that keeps the size but for its stride, BatchNorm, ReLU."""
    convolution = nn.Conv2d(channels, out, kernel, stride=stride, padding=kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(out), nn.ReLU(inplace=True)]


def residual_block(
    channels: int, out: int, stride: int, bottleneck: bool, width: int | None = None, groups: int = 1
) -> nn.Module:
    """ResNet's block, with a projection shortcut where the shape changes.

    Args:
        channels: of the input.
        out: of the output.
        stride: of its 3x3 convolution, the first of a basic block.
        bottleneck: of 1x1, 3x3 and 1x1; otherwise a basic block of two 3x3.
        width: of the bottleneck's 3x3; ``None`` takes a quarter of ``out``.
        groups: of that convolution.

    Raises:
        UserError: channels that a bottleneck can't have.
    """
    changes = stride > 1 or out != channels
    shortcut = downsample_conv(channels, out, kernel_size=1, stride=stride) if changes else None
    if not bottleneck:
        return BasicBlock(channels, out, stride=stride, downsample=shortcut)
    planes, inside = out // 4, width or out // 4
    if out % 4 or inside % groups:
        wrong = (
            f"{out} channels are no multiple of 4"
            if out % 4
            else f"{inside} inside can't have {groups} groups"
        )
        raise UserError(f"no bottleneck fits: {wrong}; method.head.dec_block=basic is possible")
    base = (
        64 * (inside // groups + 0.5) / planes
    )  # timm's unit for the width of a group, which it rounds down
    return Bottleneck(
        channels,
        planes,
        stride=stride,
        downsample=shortcut,
        cardinality=groups,
        base_width=base,  # type: ignore[arg-type]  # a float serves
    )


def mlp(widths: Sequence[int], bn: str) -> list[nn.Module]:
    """Linear layers of these widths, ReLU between; BatchNorm after "none", the "hidden" or "all" of them.

    "all_plain" is "all", where the last one has no weights.
    """
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(widths)):
        last = i == len(widths) - 2
        normed = bn in ("all", "all_plain") or (bn == "hidden" and not last)
        layers.append(nn.Linear(a, b, bias=not normed))
        layers += [nn.BatchNorm1d(b, affine=not (last and bn == "all_plain"))] if normed else []
        layers += [] if last else [nn.ReLU(inplace=True)]
    return layers


def linear(shape: Shape, out: int) -> nn.Module:
    """Global average pooling and one linear layer."""
    return nn.Sequential(GlobalAveragePool(), nn.Linear(shape.channels, out))


def no_conv_two_fc(shape: Shape, out: int) -> nn.Module:
    """InfoPro's 0c2f: pooling and an MLP of 128 hidden units."""
    return nn.Sequential(GlobalAveragePool(), *mlp((shape.channels, 128, out), "none"))


def one_conv_two_fc(shape: Shape, out: int) -> nn.Module:
    """InfoPro's: 3x3 convolution to twice the channels at stride 2 (64 channels keep both), 128-d MLP."""
    width, stride = (shape.channels, 1) if shape.channels >= 64 else (2 * shape.channels, 2)
    layers = conv_bn_relu(shape.channels, width, 3, stride)
    return nn.Sequential(*layers, GlobalAveragePool(), *mlp((width, 128, out), "none"))


def four_conv_one_fc(shape: Shape, out: int) -> nn.Module:
    """InfoPro's on ImageNet: 1x1 to 128, 3x3 to 256 and to 512 at stride 2, 1x1 to 2048, pooling, linear."""
    layers = conv_bn_relu(shape.channels, 128, 1)
    layers += [*conv_bn_relu(128, 256, 3, 2), *conv_bn_relu(256, 512, 3, 2), *conv_bn_relu(512, 2048, 1)]
    return nn.Sequential(*layers, GlobalAveragePool(), nn.Linear(2048, out))


def two_conv_one_fc(shape: Shape, out: int) -> nn.Module:
    """MLAAN's on ResNet-34 (its code): 1x1 to twice the channels and back, not from 256 channels on."""
    c = shape.channels
    layers = [*conv_bn_relu(c, 2 * c, 1), *conv_bn_relu(2 * c, c, 1)] if c < 256 else []
    return nn.Sequential(*layers, GlobalAveragePool(), nn.Linear(c, out))


def three_conv_four_fc(shape: Shape, out: int) -> nn.Module:
    """DGL* in earlier commits of MLAAN's code: three 1x1 convolutions to 128, pooling, three hidden layers of 512."""
    layers = conv_bn_relu(shape.channels, 128, 1) + conv_bn_relu(128, 128, 1) + conv_bn_relu(128, 128, 1)
    return nn.Sequential(*layers, GlobalAveragePool(), *mlp((128, 512, 512, 512, out), "hidden"))


def mlp_sr(
    shape: Shape, out: int, convolutions: int = 3, hidden_layers: int = 3, bias: bool = True
) -> nn.Module:
    """DGL's MLP-SR-aux: a quarter of the resolution, three 1x1 convolutions, 2x2 pooling, MLP."""
    c = shape.channels
    layers: list[nn.Module] = [nn.AdaptiveAvgPool2d((-(-shape.height // 4), -(-shape.width // 4)))]
    for _ in range(convolutions):
        layers += conv_bn_relu(c, c, 1)
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    for _ in range(hidden_layers):
        layers += [nn.Linear(4 * c, 4 * c, bias=bias), nn.BatchNorm1d(4 * c), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(4 * c, out))


def mlp_sr_auglocal(shape: Shape, out: int) -> nn.Module:
    """AugLocal's MLP-SR-aux, two hidden layers without bias; probably behind the DGL numbers of later papers."""
    return mlp_sr(shape, out, hidden_layers=2, bias=False)


def dgl_mlp(shape: Shape, out: int) -> nn.Module:
    """DGL's MLP-aux: MLP-SR-aux without the convolutions."""
    return mlp_sr(shape, out, convolutions=0)


def dgl_cnn(shape: Shape, out: int) -> nn.Module:
    """DGL's CNN-aux: two 3x3 convolutions at full resolution, 2x2 pooling, linear."""
    c = shape.channels
    layers = [*conv_bn_relu(c, c, 3), *conv_bn_relu(c, c, 3)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * c, out))


#: By the kinds that ``heads.Kind`` lists.
TRUNKS: dict[str, Callable[[Shape, int], nn.Module]] = {
    "linear": linear,
    "mlp_sr": mlp_sr,
    "mlp_sr_auglocal": mlp_sr_auglocal,
    "mlp": dgl_mlp,
    "cnn": dgl_cnn,
    "0c2f": no_conv_two_fc,
    "1c2f": one_conv_two_fc,
    "2c1f": two_conv_one_fc,
    "3c4f": three_conv_four_fc,
    "4c1f": four_conv_one_fc,
}
