"""PResNet-50 and ShuffleNet v2-50 as Detectron2 backbones with FPN.

    import framework.detection.backbones as backbones  # registers both builders
    cfg = get_cfg()
    backbones.add_config(cfg)
    backbones.configure(cfg, "shufflenetv2_50")

FPN wants strides 4, 8, 16 and 32. ShuffleNet v2-50 has them. PResNet-50 has 4, 6.2, 9.3, 14, 18.7 and 28: the stages
nearest to the four (res2, res4, res5, res7) are interpolated to them. The paper has no detector on PResNet-50.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from torch import Tensor, nn

from framework import network
from framework.detection.layouts import RESNETS, to_own_backbone
from framework.network.structure import Steps, structure
from framework.runtime.errors import UserError

STRIDES = {
    "presnet50": {"res2": 4, "res4": 8, "res5": 16, "res7": 32},
    "shufflenetv2_50": {"res2": 4, "res3": 8, "res4": 16, "res5": 32},
}


def add_config(cfg: CfgNode) -> None:
    """Add the keys of this package to Detectron2's configuration.

    ``MODEL.SHUFFLENET.C5`` is what FPN reads at stride 32: "conv5_x", or "conv6".
    ``MODEL.BACKBONE.FROZEN_BN`` is how the BatchNorms of frozen stages normalize: "eval", with the statistics of
    pretraining, or "batch". LoCo (section 5.2) says neither.
    """
    cfg.MODEL.SHUFFLENET = CfgNode({"C5": "conv5_x"})
    cfg.MODEL.BACKBONE.FROZEN_BN = "eval"


def configure(cfg: CfgNode, name: str) -> None:
    """Let ``cfg`` build the network ``name``, one of ``layouts.NETWORKS``."""
    if name in RESNETS:
        cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
        cfg.MODEL.RESNETS.DEPTH = RESNETS[name]
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if RESNETS[name] < 50 else 256
        cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
        levels = ["res2", "res3", "res4", "res5"]
        cfg.MODEL.RESNETS.OUT_FEATURES = levels
    else:
        cfg.MODEL.BACKBONE.NAME = f"build_{name}_fpn_backbone"
        levels = list(STRIDES[name])
    cfg.MODEL.FPN.IN_FEATURES = levels


class StagedBackbone(Backbone):
    """Stem and stages of one of our networks, in Detectron2's terms: ``stem``, ``res2``, ``res3`` ...

    Args:
        net: the network; its children move here.
        strides: feature name -> stride at which it is given.
        tail: run what follows the last stage (conv6) on the last feature.
    """

    def __init__(self, net: nn.Module, strides: Mapping[str, int], tail: bool = False) -> None:
        super().__init__()
        parts = structure(net)
        self.stem = _sequence(net, parts.stem)
        self.stages = []
        shape = {}
        for stage, info in zip(parts.stages, net.feature_info, strict=True):  # type: ignore[arg-type]
            name = to_own_backbone(f"{stage.name}.").rstrip(".")
            self.add_module(name, net.get_submodule(stage.name))
            self.stages.append(name)
            shape[name] = info["num_chs"]
        self.tail = _sequence(net, parts.tail) if tail else None
        if tail:
            shape[self.stages[-1]] = net.num_features
        self._out_features = list(strides)
        self._out_feature_strides = dict(strides)
        self._out_feature_channels = {name: shape[name] for name in strides}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) -> every feature (N, C, H / stride, W / stride); the stride must divide H and W."""
        height, width = x.shape[2:]
        features = {}
        x = self.stem(x)
        for name in self.stages:
            x = self.get_submodule(name)(x)
            if name == self.stages[-1] and self.tail is not None:
                x = self.tail(x)
            if stride := self._out_feature_strides.get(name):
                features[name] = at_size(x, height // stride, width // stride)
        return features

    def freeze(self, freeze_at: int) -> None:
        """Freeze the stem (1), and the stages up to res2 (2), res3 (3) ...; their BatchNorms become FrozenBN."""
        last = len(self.stages) + 1
        for number, name in enumerate(["stem", *self.stages], start=1):
            parts = [name, "tail"] if number == last and self.tail is not None else [name]
            for part in parts if number <= freeze_at else ():
                module = self.get_submodule(part)
                module.requires_grad_(False)
                FrozenBatchNorm2d.convert_frozen_batchnorm(module)


def at_size(x: Tensor, height: int, width: int) -> Tensor:
    """(N, C, h, w) -> (N, C, height, width) by bilinear interpolation; as it is where that is its size."""
    if x.shape[2:] == (height, width):
        return x
    return F.interpolate(x, (height, width), mode="bilinear", align_corners=False)


def thaw_statistics(bottom_up: nn.Module) -> None:
    """Frozen stages normalize with the batch; their weights, and those of their BatchNorms, stay frozen."""
    for module in list(bottom_up.modules()):
        for name, child in module.named_children():
            if isinstance(child, FrozenBatchNorm2d):
                norm = FrozenBatchNorm2d.convert_frozenbatchnorm2d_to_batchnorm2d(child)
                setattr(module, name, norm.requires_grad_(False))


@BACKBONE_REGISTRY.register()
def build_presnet50_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """PResNet-50 with FPN."""
    return _with_fpn(cfg, "presnet50", tail=False)


@BACKBONE_REGISTRY.register()
def build_shufflenetv2_50_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """ShuffleNet v2-50 with FPN.

    Raises:
        UserError: ``MODEL.SHUFFLENET.C5`` is neither of its choices.
    """
    c5 = cfg.MODEL.SHUFFLENET.C5
    if c5 not in ("conv5_x", "conv6"):
        raise UserError(f"MODEL.SHUFFLENET.C5={c5}: must be conv5_x or conv6")
    return _with_fpn(cfg, "shufflenetv2_50", tail=c5 == "conv6")


def _with_fpn(cfg: CfgNode, name: str, tail: bool) -> Backbone:
    levels, strides = list(cfg.MODEL.FPN.IN_FEATURES), STRIDES[name]
    if levels != list(strides):
        raise UserError(f"MODEL.FPN.IN_FEATURES={levels}: must be {list(strides)} for {name}")
    bottom_up = StagedBackbone(network.create(name), strides, tail)
    bottom_up.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)
    _set_norm(bottom_up, cfg.MODEL.RESNETS.NORM)
    return FPN(
        bottom_up=bottom_up,
        in_features=levels,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def _set_norm(bottom_up: nn.Module, norm: str) -> None:
    """The kind of BatchNorm of the stages that are not frozen; ``MODEL.RESNETS.NORM`` holds for these networks too."""
    converters: dict[str, Any] = {
        "BN": lambda module: module,
        "SyncBN": nn.SyncBatchNorm.convert_sync_batchnorm,
        "FrozenBN": FrozenBatchNorm2d.convert_frozen_batchnorm,
    }
    if norm not in converters:
        raise UserError(f"MODEL.RESNETS.NORM={norm}: must be one of {', '.join(converters)}")
    converters[norm](bottom_up)


def _sequence(net: nn.Module, steps: Steps) -> nn.Sequential:
    names = [step for step in steps.evaluation if isinstance(step, str)]
    return nn.Sequential(OrderedDict((name, net.get_submodule(name)) for name in names))
