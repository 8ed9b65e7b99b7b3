"""Whether weights really arrived: tensors against the file, features against the network that they came from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone
from torch import Tensor, nn

from framework.detection import backbones, conversion, weight_files
from framework.detection.conversion import Match
from framework.runtime.errors import UserError

TOLERANCE = 1e-4  # of the largest feature; other kernels may round otherwise, a wrong tensor is far off


class Level(NamedTuple):
    """One feature of both networks: shape, largest absolute value, largest absolute difference."""

    name: str
    shape: tuple[int, ...]
    largest: float
    difference: float


@torch.no_grad()
def compare(match: Match, path: Path) -> list[Level]:
    """Run one image through timm's network and through Detectron2's, which loads the file ``path``.

    Both end with the network's last layer, conv6 in ShuffleNet v2-50.

    Raises:
        UserError: a tensor of Detectron2's backbone is not the file's.
    """
    cfg = get_cfg()
    backbones.add_config(cfg)
    backbones.configure(cfg, match.network)
    cfg.MODEL.SHUFFLENET.C5 = "conv6"
    backbone = build_backbone(cfg).eval()
    load(backbone.bottom_up, path, "")
    image = torch.randn(2, 3, 192, 224, generator=torch.Generator().manual_seed(0))
    stages = _stage_outputs(conversion.build(match), image)
    levels = []
    for name, feature in backbone.bottom_up(image).items():
        expected = backbones.at_size(stages[name], *feature.shape[2:])
        difference = float((feature - expected).abs().max())
        levels.append(Level(name, tuple(feature.shape), float(expected.abs().max()), difference))
    return levels


def check(levels: list[Level]) -> None:
    """Refuse features that differ.

    Raises:
        UserError: a level's difference is more than rounding.
    """
    for level in levels:
        if not level.difference <= TOLERANCE * level.largest:
            raise UserError(f"{level.name} differs by {level.difference:.3g}: the file is not to be used")


def load(model: nn.Module, path: Path, prefix: str) -> int:
    """Load a file through Detectron2 and make sure that everything below ``prefix`` is the file's.

    Returns:
        How many tensors are below ``prefix``.

    Raises:
        UserError: the file is missing, damaged or no plain tensors, or a tensor kept its initial value.
    """
    content = read(path)
    DetectionCheckpointer(model).load(str(path))
    return check_arrival(model, content, prefix, path)


def read(path: Path) -> dict[str, Any]:
    """A file that Detectron2 starts from: its tensors, or arrays, are below ``model``.

    Raises:
        UserError: the file is missing, damaged, or more than tensors.
    """
    if not path.exists():
        raise UserError(f"MODEL.WEIGHTS={path}: no such file")
    if path.suffix == ".pkl":
        return weight_files.read_pickle(path)
    if path.suffix != ".pth":
        raise UserError(
            f"MODEL.WEIGHTS={path}: convert it first: tools/convert_to_detectron2.py {path} -o X.pkl"
        )
    return {"model": conversion.torch_file(path)}


def check_arrival(model: nn.Module, content: Mapping[str, Any], prefix: str, path: Path) -> int:
    """Compare every tensor of ``model`` below ``prefix`` with the file's; returns their number.

    Raises:
        UserError: one is not in the file, or has another value.
    """
    saved = content["model"]
    here = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.startswith(prefix) and not name.endswith("num_batches_tracked")
    }
    lost = [name for name, tensor in here.items() if not _same(tensor, _by_suffix(saved, name))]
    if lost:
        whose = f" of {content['network']}" if "network" in content else ""
        raise UserError(
            f"MODEL.WEIGHTS={path}: its {len(saved)} tensors{whose} fill {len(here) - len(lost)} of the {len(here)} "
            f"that {prefix or 'the detector'} has; {lost[0]} would keep its initial value. Does the configuration "
            f"build the same network (MODEL.BACKBONE.NAME, MODEL.RESNETS.DEPTH)?"
        )
    return len(here)


def _by_suffix(saved: Mapping[str, Any], name: str) -> Any:
    """Detectron2's rule: the longest end of ``name`` that the file knows."""
    while name not in saved and "." in name:
        name = name.partition(".")[2]
    return saved.get(name)


def _same(tensor: Tensor, other: Any) -> bool:
    return other is not None and torch.equal(tensor.cpu(), torch.as_tensor(other))


def _stage_outputs(net: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Outputs of ``layer1``, ``layer2`` ... as ``res2``, ``res3`` ..., the last one after all layers."""
    stages = [name for name, _ in net.named_children() if name.startswith("layer")]
    outputs: dict[str, Tensor] = {}
    for name in stages:
        key = f"res{int(name.removeprefix('layer')) + 1}"
        net.get_submodule(name).register_forward_hook(
            lambda module, args, output, key=key: outputs.update({key: output.clone()})
        )
    last = net.forward_features(image)  # type: ignore[operator]
    return {**outputs, key: last}
