"""CIFAR ResNets of depth 6n+2 (He et al. 2016, section 4.2), registered with timm.

Projection shortcuts (1x1 convolution and BatchNorm) as in the code of InfoPro, AugLocal and MLAAN:
0.467 M parameters for depth 32 and 1.731 M for depth 110 with ten classes.

``resnet18_cifar`` has the four stages of ImageNet's ResNet-18 behind the same stem, for contrastive methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, is_model, register_model
from timm.models.resnet import BasicBlock, downsample_conv
from torch import nn

from framework.network.convnet import ConvNet

CHANNELS = (16, 32, 64)
MAX_DEPTH = 110


class CifarResNet(ConvNet):
    """3x3 stem, then stages of basic blocks, each but the first at half the resolution; names as in timm's ResNet.

    Args:
        blocks: residual blocks a stage, n of depth 6n+2.
        channels: of the stages; the stem has those of the first.
        num_classes: outputs of ``fc``; 0 leaves the pooled feature, of the last stage's channels.
        in_chans: input channels.
        zero_init_last: start every residual branch at zero (off in the papers' CIFAR code).
    """

    def __init__(
        self,
        blocks: int,
        channels: Sequence[int] = CHANNELS,
        num_classes: int = 10,
        in_chans: int = 3,
        zero_init_last: bool = False,
    ) -> None:
        super().__init__()
        width = channels[0]
        self.conv1 = nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        for stage, wider in enumerate(channels, start=1):
            self.add_module(f"layer{stage}", _stage(width, wider, blocks))
            width = wider
        self.add_head(width, num_classes)
        for module in self.modules() if zero_init_last else ():
            if isinstance(module, BasicBlock):
                module.zero_init_last()


def _stage(width: int, channels: int, blocks: int) -> nn.Sequential:
    stride = 1 if width == channels else 2
    shortcut = downsample_conv(width, channels, kernel_size=1, stride=stride) if stride == 2 else None
    first = BasicBlock(width, channels, stride=stride, downsample=shortcut)
    return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(blocks - 1)))


def _entry_point(depth: int) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(
            CifarResNet, f"resnet{depth}", pretrained, blocks=(depth - 2) // 6, **kwargs
        )

    create.__name__, create.__doc__ = f"resnet{depth}", f"CIFAR ResNet of depth {depth}."
    return create


# timm's own resnet26 and resnet50 keep their names; the other depths 6n+2 are free.
_DEPTHS = [depth for depth in range(8, MAX_DEPTH + 1, 6) if not is_model(f"resnet{depth}")]
_CONFIG = {
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "pool_size": (8, 8),
    "crop_pct": 1.0,
    "first_conv": "conv1",
    "classifier": "fc",
}
default_cfgs = generate_default_cfgs(
    {
        **{f"resnet{depth}": _CONFIG for depth in _DEPTHS},
        "resnet18_cifar": {**_CONFIG, "pool_size": (4, 4)},
    }
)
for _depth in _DEPTHS:
    register_model(_entry_point(_depth))


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-18 for small images: 11.2 M parameters; ``channels`` makes it narrower."""
    channels = kwargs.pop("channels", (64, 128, 256, 512))
    return build_model_with_cfg(
        CifarResNet, "resnet18_cifar", pretrained, blocks=2, channels=channels, **kwargs
    )
