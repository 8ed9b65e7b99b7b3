"""PResNet-50 (Xiong et al. 2020, section 5.6 and appendix B): a ResNet-50 that loses resolution in six small steps.

Registered with timm as ``presnet50``. The paper's Table 8 (layers) and Table 6 (FLOPs) disagree; the default
follows Table 6, whose total and shares only this reading gives (see ``pres_groups``).
"""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import downsample_conv
from torch import Tensor, nn

from framework.network.convnet import ConvNet, imagenet_config

STEM = 32
WIDTHS = (56, 96, 144, 256, 512, 1024)
SIDES = (56, 36, 24, 16, 12, 8)  # of the maps of a 224 pixel image
GROUPS = (1, 1, 1, 2, 16, 128)
EXPANSION = 4
BLOCKS = 3


class Resize(nn.Module):
    """Bilinear interpolation in the ratio of two sides, rounded; its backward is not deterministic on GPUs.

    Args:
        old: side of the input, for 224 pixel images.
        new: side of the output.
        align_corners: corner rule of ``interpolate``.
    """

    def __init__(self, old: int, new: int, align_corners: bool) -> None:
        super().__init__()
        self.old, self.new, self.align_corners = old, new, align_corners

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H * new / old, W * new / old), at least one pixel."""
        size = [max(1, (side * self.new + self.old // 2) // self.old) for side in x.shape[2:]]
        return F.interpolate(x, size, mode="bilinear", align_corners=self.align_corners)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; ``resize`` acts on the block's input."""

    def __init__(self, width: int, out: int, resize: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.resize = resize
        self.conv1 = nn.Conv2d(width, out, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = shortcut
        self.act2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, H, W) -> (N, out, H', W')."""
        x = self.resize(x)
        y = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(y)) + self.shortcut(x))

    def zero_init_last(self) -> None:
        """Start as the shortcut alone."""
        nn.init.zeros_(self.bn2.weight)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution beside a shortcut.

    Args:
        width: channels of the input.
        inner: channels of the 3x3 convolution.
        out: channels of the output.
        groups: of each of the three convolutions.
        resize: the resizing to this stage's resolution.
        resize_at: on the block's input ("pre"), or before the 3x3 convolution and on the shortcut ("mid").
        shortcut: maps the resized input to the output's channels.
    """

    def __init__(
        self,
        width: int,
        inner: int,
        out: int,
        groups: tuple[int, int, int],
        resize: nn.Module,
        resize_at: Literal["mid", "pre"],
        shortcut: nn.Module,
    ) -> None:
        super().__init__()
        self.resize, self.resize_at = resize, resize_at
        self.conv1 = nn.Conv2d(width, inner, 1, groups=groups[0], bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, groups=groups[1], bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(inner, out, 1, groups=groups[2], bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.shortcut = shortcut
        self.act3 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, H, W) -> (N, out, H', W')."""
        resized = self.resize(x)
        if self.resize_at == "pre":
            y = self.act1(self.bn1(self.conv1(resized)))
        else:
            y = self.resize(self.act1(self.bn1(self.conv1(x))))
        y = self.act2(self.bn2(self.conv2(y)))
        return self.act3(self.bn3(self.conv3(y)) + self.shortcut(resized))

    def zero_init_last(self) -> None:
        """Start as the shortcut alone."""
        nn.init.zeros_(self.bn3.weight)


class PResNet(ConvNet):
    """Six stages of three blocks at 56, 36, 24, 16, 12 and 8 pixels (of 224), 4096 features.

    Other image sizes keep these ratios, rounded.

    Args:
        num_classes: outputs of ``fc``; 0 leaves the pooled feature.
        in_chans: input channels.
        pres_groups: where the last 1x1 convolution of blocks 2 and 3 is grouped: in ``layer6`` ("table6") or
            in ``layer4`` to ``layer6`` ("table8").
        pres_resize: resize on a block's input ("pre") or where a strided ResNet would stride ("mid").
        pres_res4_width: 144 (Table 8, and the FLOPs) or 128 (what Table 6 counts memory with).
        align_corners: corner rule of the interpolation; the paper does not say.
        zero_init_last: start every residual branch at zero, timm's default for ResNets.

    Raises:
        ValueError: an argument is none of its choices.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        pres_groups: Literal["table6", "table8"] = "table6",
        pres_resize: Literal["mid", "pre"] = "mid",
        pres_res4_width: Literal[144, 128] = 144,
        align_corners: bool = False,
        zero_init_last: bool = True,
    ) -> None:
        super().__init__()
        _check("pres_groups", pres_groups, ("table6", "table8"))
        _check("pres_resize", pres_resize, ("mid", "pre"))
        _check("pres_res4_width", pres_res4_width, (144, 128))
        self.conv1 = nn.Conv2d(in_chans, STEM, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.act1 = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.feature_info = []
        width, old = STEM, SIDES[0]
        for stage, (inner, new, groups) in enumerate(zip(WIDTHS, SIDES, GROUPS, strict=True), start=1):
            resize = nn.Identity() if old == new else Resize(old, new, align_corners)
            if stage <= 2:
                out, blocks = inner, _basic_stage(width, inner, resize)
            else:
                inner = pres_res4_width if stage == 3 else inner
                last = groups if stage == 6 or pres_groups == "table8" else 1
                out = inner * EXPANSION
                blocks = _bottleneck_stage(width, inner, (groups, groups, last), resize, pres_resize)
            self.add_module(f"layer{stage}", blocks)
            self.feature_info.append({"num_chs": out, "reduction": 224 // new, "module": f"layer{stage}"})
            width, old = out, new
        self.add_head(width, num_classes)
        for module in self.modules() if zero_init_last else ():
            if isinstance(module, BasicBlock | Bottleneck):
                module.zero_init_last()


def _basic_stage(width: int, out: int, resize: nn.Module) -> nn.Sequential:
    first = BasicBlock(width, out, resize, downsample_conv(width, out, kernel_size=1))
    others = (BasicBlock(out, out, nn.Identity(), nn.Identity()) for _ in range(BLOCKS - 1))
    return nn.Sequential(first, *others)


def _bottleneck_stage(
    width: int, inner: int, groups: tuple[int, int, int], resize: nn.Module, resize_at: Literal["mid", "pre"]
) -> nn.Sequential:
    """The first block never groups its last convolution."""
    out = inner * EXPANSION
    shortcut = downsample_conv(width, out, kernel_size=1)
    first = Bottleneck(width, inner, out, (*groups[:2], 1), resize, resize_at, shortcut)
    others = (
        Bottleneck(out, inner, out, groups, nn.Identity(), resize_at, nn.Identity())
        for _ in range(BLOCKS - 1)
    )
    return nn.Sequential(first, *others)


def _check(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value} must be one of {', '.join(map(str, choices))}")


default_cfgs = generate_default_cfgs({"presnet50": imagenet_config(side=SIDES[-1])})


@register_model
def presnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PResNet-50: 27.3 M parameters, 4.1 G multiply-adds (25.0 M and 3.8 G as Table 8 has it)."""
    return build_model_with_cfg(PResNet, "presnet50", pretrained, **kwargs)
