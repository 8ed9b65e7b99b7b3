"""What other libraries call the tensors of a backbone that has timm's names.

A layout is a function from timm's name to the other one. Classifiers and BatchNorm's step counters have none.
"""

from __future__ import annotations

import re
from collections.abc import Callable

RESNETS = {f"resnet{depth}": depth for depth in (18, 34, 50, 101, 152)}
OWN = ("presnet50", "shufflenetv2_50")
NETWORKS = (*RESNETS, *OWN)
#: library -> suffix of the weight files that it reads
SUFFIXES = {"detectron2": ".pkl", "torchvision": ".pth", "mmdet": ".pth"}

Layout = Callable[[str], str]


def to_detectron2(name: str) -> str:
    """A ResNet's tensor in Detectron2: ``layer1.0.bn2.bias`` -> ``res2.0.conv2.norm.bias``."""
    name = _to_stages(name)
    name = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)
    return name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")


def to_own_backbone(name: str) -> str:
    """PResNet-50 and ShuffleNet v2-50 in ``backbones.StagedBackbone``: ``layer1`` -> ``res2``, the rest kept."""
    return _to_stages(name)


def to_torchvision(name: str) -> str:
    """timm's ResNets have torchvision's names."""
    return name


def to_mmdet(name: str) -> str:
    """mmdetection has torchvision's names below ``backbone``."""
    return f"backbone.{name}"


def layout(to: str, network: str) -> Layout | None:
    """The names of ``network`` in the library ``to``; None where that library lacks the network."""
    if network in OWN:
        return to_own_backbone if to == "detectron2" else None
    return {"detectron2": to_detectron2, "torchvision": to_torchvision, "mmdet": to_mmdet}[to]


def _to_stages(name: str) -> str:
    """Children before the stages belong to ``stem``, those after them (conv6) to ``tail``."""
    if match := re.match(r"layer(\d)\.(.*)", name):
        return f"res{int(match[1]) + 1}.{match[2]}"
    return f"tail.{name}" if re.match(r"(conv|bn)6\.", name) else f"stem.{name}"
