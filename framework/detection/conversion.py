"""A backbone's tensors from wherever they are, checked against the network that they claim to be.

Nothing is unpickled but tensors: safetensors, or ``torch.load`` with ``weights_only``.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from timm.models import get_pretrained_cfg
from torch import Tensor, nn
from yaml import YAMLError

from framework import network
from framework.checkpoints.folder import MANIFEST
from framework.checkpoints.run_checkpoints import newest_checkpoint
from framework.checkpoints.snapshot import ABOUT, read_model
from framework.detection.layouts import NETWORKS, Layout
from framework.detection.normalization import Normalization
from framework.execution.weight_average import evaluated_prefix
from framework.runtime.errors import UserError

#: ``network.args`` that change training or initial values, but not what the trained network computes
HARMLESS = {"zero_init_last", "drop_rate", "drop_path_rate", "drop_block_rate"}


class Weights(NamedTuple):
    """Tensors from somewhere.

    Attributes:
        where: they came from, for messages.
        tensors: by timm's names.
        network: timm's name of the network, None if the file does not say.
        normalization: of the images in pretraining, None if the file does not say.
        unused: name of every other tensor or set of tensors there -> why it is not used.
    """

    where: str
    tensors: Mapping[str, Tensor]
    network: str | None = None
    normalization: Normalization | None = None
    unused: Mapping[str, str] = {}


@dataclass(frozen=True)
class Match:
    """The tensors of a network, all of them, and what else there was.

    Attributes:
        network: one of ``layouts.NETWORKS``.
        tensors: by timm's names; no classifier, no step counters.
        unused: name of every other tensor or set of tensors -> why it is not used.
        normalization: of the images in pretraining, None if nobody says.
    """

    network: str
    tensors: dict[str, Tensor]
    unused: dict[str, str]
    normalization: Normalization | None = None

    @property
    def pixels(self) -> dict[str, list[float]]:
        """The normalization in Detectron2's terms; empty if nobody says."""
        return self.normalization.pixels if self.normalization else {}

    def renamed(self, names: Layout) -> dict[str, Tensor]:
        """The tensors under another library's names."""
        return {names(name): tensor for name, tensor in self.tensors.items()}


def read(path: Path) -> Weights:
    """The backbone of a run folder, a checkpoint, or a safetensors or PyTorch file with timm's names.

    Raises:
        UserError: there is none, it is damaged, or it would have to be unpickled.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise UserError(f"{path}: no such run folder, checkpoint or file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in (".pth", ".pt", ".bin", ".tar"):
        tensors, unused = _state_dict(path)
        return _backbone(Weights(str(path), tensors, unused=unused))
    raise UserError(
        f"{path}: not read: give a run folder, a checkpoint, a .safetensors or a .pth file"
        + (" (unpickling a .pkl would run whatever code it names)" if path.suffix == ".pkl" else "")
    )


def from_timm(name: str, pretrained: bool) -> Weights:
    """timm's own weights of an architecture, or random ones.

    Raises:
        UserError: the network can't be converted, or has no weights within reach.
    """
    architecture = name.split(".")[0]
    if architecture not in NETWORKS:
        raise UserError(f"--timm {name}: must be one of {', '.join(NETWORKS)}")
    try:
        net = network.create(name, pretrained=pretrained)
    except (OSError, RuntimeError) as error:  # no connection, no such weights
        raise UserError(f"--timm {name} --pretrained: no weights: {str(error).splitlines()[0]}") from error
    said = get_pretrained_cfg(name) if pretrained else None
    normalization = Normalization(tuple(said.mean), tuple(said.std)) if said else None
    return Weights(f"timm's {name}", net.state_dict(), architecture, normalization)


def match(weights: Weights) -> Match:
    """Find the network that the tensors belong to, and nothing but the network.

    Raises:
        UserError: a tensor of the network is missing or of another shape, or the network has one more, so
            that a detector would keep an initial value or compute something else.
    """
    tensors = {n: t for n, t in weights.tensors.items() if not n.endswith("num_batches_tracked")}
    candidates = [weights.network] if weights.network else NETWORKS
    if weights.network and weights.network not in NETWORKS:
        raise UserError(f"{weights.where}: {weights.network} can't be converted; {', '.join(NETWORKS)} can")
    faults = {name: _faults(tensors, expected(name)) for name in candidates}
    best = min(faults, key=lambda name: len(faults[name]))
    shapes = expected(best)
    if faults[best]:
        matched = sum(name in tensors and tensors[name].shape == shape for name, shape in shapes.items())
        if not matched:
            raise UserError(
                f"{weights.where}: no backbone: none of its {len(tensors)} tensors ({_some(tensors)}) is one of "
                f"{best}'s, which are called {_some(shapes)}"
            )
        raise UserError(
            f"{weights.where}: no whole {best}: {matched} of its {len(shapes)} tensors match; {_some(faults[best])}"
        )
    unused = {name: _why_unused(name) for name in weights.tensors if name not in shapes}
    found = {name: tensors[name] for name in shapes}
    return Match(best, found, {**unused, **weights.unused}, weights.normalization)


@cache
def expected(name: str) -> Mapping[str, torch.Size]:
    """Shapes of a network's tensors by timm's names, step counters left out; nothing is computed."""
    with torch.device("meta"):
        state = network.create(name).state_dict()
    return {key: t.shape for key, t in state.items() if not key.endswith("num_batches_tracked")}


def build(match: Match) -> nn.Module:
    """timm's network with these tensors, in evaluation mode."""
    net = network.create(match.network)
    net.load_state_dict(match.tensors, strict=False)  # the counters alone are missing
    return net.eval()


def torch_file(path: Path) -> dict[str, Tensor]:
    """The state dict of a .pth file, also one below ``state_dict`` or ``model``; nothing but tensors is unpickled.

    Raises:
        UserError: the file is damaged, or holds anything else.
    """
    return _state_dict(path)[0]


def _state_dict(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As ``torch_file``; and what other sets of tensors there are -> why they are not used."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: damaged, or holds more than tensors, and is not unpickled: save its state dict alone"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{path}: damaged, or no PyTorch file: {str(error).splitlines()[0]}") from error
    unused: dict[str, str] = {}
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            others = (name for name, value in content.items() if name != key and _has_tensors(value))
            unused |= {str(name): f"weights beside {key}, which are taken" for name in others}
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise UserError(f"{path}: holds no state dict, that is names with tensors")
    return content, unused


def _has_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(t, Tensor) for t in value.values())


def _faults(tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> list[str]:
    faults = []
    for name, shape in shapes.items():
        if name not in tensors:
            faults.append(f"{name} is missing")
        elif tensors[name].shape != shape:
            faults.append(f"{name} is {tuple(tensors[name].shape)} and not {tuple(shape)}")
    # A tensor more inside the stages (squeeze-and-excitation, say) makes it another network.
    own = {name.partition(".")[0] for name in shapes}
    extra = (name for name in tensors if name not in shapes and name.partition(".")[0] in own)
    return [*faults, *(f"{name} is one too many" for name in extra)]


def _why_unused(name: str) -> str:
    if name.endswith("num_batches_tracked"):
        return "a step counter"
    return "the classifier" if name.startswith("fc.") else "no tensor of the backbone"


def _some(names: Any) -> str:
    first = [str(name) for name in names][:3]
    return ", ".join(first) + (" ..." if len(names) > len(first) else "")


def _read_folder(path: Path) -> Weights:
    if (path / MANIFEST).exists():
        return _read_checkpoint(path)
    if not (path / "recipe.yaml").exists():
        raise UserError(f"{path}: neither a run folder (no recipe.yaml) nor a checkpoint (no manifest.json)")
    try:
        recipe = OmegaConf.load(path / "recipe.yaml")
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path / 'recipe.yaml'}: can't be read: {' '.join(str(error).split())}") from error
    said = _said_of_network(path, recipe)
    exported = path / "backbone.safetensors"
    if exported.exists():
        return _read_safetensors(exported)._replace(**said)
    folder = newest_checkpoint(path)
    if folder is None:
        raise UserError(f"{path}: holds neither backbone.safetensors nor a checkpoint yet")
    return _read_checkpoint(folder)


def _read_checkpoint(folder: Path) -> Weights:
    state, model = read_model(folder)
    said = _said_of_network(folder, OmegaConf.create(state["recipe"]))
    return _backbone(Weights(str(folder), model))._replace(**said)


def _said_of_network(path: Path, recipe: Any) -> dict[str, Any]:
    """What a recipe says of the weights, as fields of ``Weights``.

    Raises:
        UserError: detectors are built with another network of that name; it is no recipe.
    """
    if not isinstance(recipe, DictConfig) or not isinstance(recipe.get("network"), DictConfig):
        raise UserError(f"{path}: its recipe has no section network")
    changed = {key: value for key, value in recipe.network.args.items() if key not in HARMLESS}
    if changed:
        raise UserError(
            f"{path}: network.args={changed} makes another {recipe.network.name} than detectors are built with"
        )
    return {"network": str(recipe.network.name), "normalization": Normalization.of_recipe(recipe)}


def _read_safetensors(path: Path) -> Weights:
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: damaged, or no safetensors file: {error}") from error
    normalization = Normalization.of_recipe(about) if "views" in about else None
    return _backbone(Weights(str(path), tensors, normalization=normalization))


def _backbone(weights: Weights) -> Weights:
    """What is below ``backbone``, where there is such a thing; DDP's ``module`` is taken off."""
    tensors, names = weights.tensors, {name.removeprefix("module."): name for name in weights.tensors}
    prefix = evaluated_prefix(names)
    below = {n.removeprefix(prefix): tensors[name] for n, name in names.items() if n.startswith(prefix)}
    if not below:
        return weights._replace(tensors={n: tensors[name] for n, name in names.items()})
    others = {n: "not below backbone" for n in names if not n.startswith(prefix)}
    return weights._replace(tensors=below, unused={**weights.unused, **others})
