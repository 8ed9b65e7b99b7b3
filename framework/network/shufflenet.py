"""ShuffleNet v2-50 (Ma et al. 2018, appendix), the second encoder of LoCo; ``shufflenetv2_50`` in timm.

conv2_x widens 64 channels to 244 at the same resolution, for which the paper has no unit: here its first has two
branches of stride 1. Units have no residual path; the paper has one in its deeper networks.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from framework.network.convnet import ConvNet, imagenet_config

STEM = 64
WIDTHS = (244, 488, 976, 1952)
UNITS = (3, 4, 6, 3)
FEATURES = 2048


class SplitUnit(nn.Module):
    """Half of the channels pass, the other half is convolved; then both are shuffled.

    Args:
        width: channels in and out.
        residual: add the convolved half to what it was, as the paper's deeper networks do.
    """

    def __init__(self, width: int, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.branch = _branch(width // 2, width // 2, stride=1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, H, W) -> the same shape."""
        passed, convolved = x.chunk(2, dim=1)
        y = self.branch(convolved)
        return _shuffle(passed, self.act(y + convolved if self.residual else y))


class TwoBranchUnit(nn.Module):
    """Two branches over all channels, each of which gives half of the output; then both are shuffled."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.shortcut = nn.Sequential(
            *_depthwise(width, stride), *_pointwise(width, out // 2), nn.ReLU(inplace=True)
        )
        self.branch = _branch(width, out // 2, stride)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, H, W) -> (N, out, H / stride, W / stride)."""
        return _shuffle(self.shortcut(x), self.act(self.branch(x)))


class ShuffleNetV2(ConvNet):
    """Stem, four stages (``layer1`` is the paper's conv2_x) and conv6, 2048 features.

    Args:
        num_classes: outputs of ``fc``; 0 leaves the pooled feature.
        in_chans: input channels.
        residual: see ``SplitUnit``; off in ShuffleNet v2-50.
    """

    def __init__(self, num_classes: int = 1000, in_chans: int = 3, residual: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, STEM, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.act1 = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.feature_info = []
        width = STEM
        for stage, (out, units) in enumerate(zip(WIDTHS, UNITS, strict=True), start=1):
            first = TwoBranchUnit(width, out, stride=1 if stage == 1 else 2)
            others = (SplitUnit(out, residual) for _ in range(units - 1))
            self.add_module(f"layer{stage}", nn.Sequential(first, *others))
            self.feature_info.append({"num_chs": out, "reduction": 2 << stage, "module": f"layer{stage}"})
            width = out
        self.conv6 = nn.Conv2d(width, FEATURES, 1, bias=False)
        self.bn6 = nn.BatchNorm2d(FEATURES)
        self.act6 = nn.ReLU(inplace=True)
        self.add_head(FEATURES, num_classes)


def _branch(width: int, out: int, stride: int) -> nn.Sequential:
    """1x1, depthwise 3x3, 1x1; the last ReLU is left to the unit."""
    return nn.Sequential(
        *_pointwise(width, out), nn.ReLU(inplace=True), *_depthwise(out, stride), *_pointwise(out, out)
    )


def _pointwise(width: int, out: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)


def _depthwise(width: int, stride: int) -> tuple[nn.Module, nn.Module]:
    convolution = nn.Conv2d(width, width, 3, stride=stride, padding=1, groups=width, bias=False)
    return convolution, nn.BatchNorm2d(width)


def _shuffle(a: Tensor, b: Tensor) -> Tensor:
    """Channels of two halves in turns: channel shuffle with two groups."""
    return torch.stack((a, b), dim=2).flatten(1, 2)


default_cfgs = generate_default_cfgs({"shufflenetv2_50": imagenet_config(side=7)})


@register_model
def shufflenetv2_50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ShuffleNet v2-50: 16.6 M parameters, 2.3 G multiply-adds."""
    return build_model_with_cfg(ShuffleNetV2, "shufflenetv2_50", pretrained, **kwargs)
