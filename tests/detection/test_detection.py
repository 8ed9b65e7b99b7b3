"""Backbones in Detectron2's names, without Detectron2: names, refusals, files that are not unpickled."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
import yaml
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from framework import network
from framework.checkpoints import folder
from framework.checkpoints.snapshot import FORMAT
from framework.detection import conversion, weight_files
from framework.detection.conversion import Weights
from framework.detection.layouts import NETWORKS, RESNETS, layout
from framework.detection.normalization import Normalization, pixels_of
from framework.engines.base import Share
from framework.runtime.errors import UserError
from framework.runtime.exit_status import EXIT_USAGE
from tests.support.commands import run_tool

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes" / "detectron2"
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def weights(name: str = "resnet18") -> dict[str, Tensor]:
    """Every tensor drawn, BatchNorms included, so that no two are alike."""
    generator = torch.Generator().manual_seed(0)
    state = network.create(name).state_dict()
    return {
        key: t if t.dtype == torch.int64 else torch.rand(t.shape, generator=generator)
        for key, t in state.items()
    }


@pytest.fixture(scope="module")
def resnet18() -> dict[str, Tensor]:
    return weights()


def detectron2_names(depth: int) -> Iterator[str]:
    """Detectron2's names of a ResNet, counted out from its structure."""

    def convolution(name: str) -> Iterator[str]:
        yield f"{name}.weight"
        yield from (f"{name}.norm.{key}" for key in ("weight", "bias", "running_mean", "running_var"))

    yield from convolution("stem.conv1")
    for stage, blocks in enumerate(BLOCKS[depth], start=2):
        for block in range(blocks):
            for number in range(1, (3 if depth >= 50 else 2) + 1):
                yield from convolution(f"res{stage}.{block}.conv{number}")
            if block == 0 and (stage > 2 or depth >= 50):
                yield from convolution(f"res{stage}.0.shortcut")


@pytest.mark.parametrize(("name", "depth"), RESNETS.items())
def test_resnets_get_detectron2_and_torchvision_names(name: str, depth: int) -> None:
    shapes = conversion.expected(name)
    names = [layout("detectron2", name)(key) for key in shapes]
    assert sorted(names) == sorted(detectron2_names(depth))
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)().state_dict()
    theirs = {k: v.shape for k, v in theirs.items() if "fc." not in k and "num_batches" not in k}
    assert {layout("torchvision", name)(key): shape for key, shape in shapes.items()} == theirs
    assert {layout("mmdet", name)(key) for key in shapes} == {f"backbone.{key}" for key in theirs}


@pytest.mark.parametrize("name", ["presnet50", "shufflenetv2_50"])
def test_own_networks_keep_every_tensor_apart_and_clear_of_the_box_head(name: str) -> None:
    """Detectron2 matches names by their ends; the box head has a conv1, conv2, conv3 and conv4 of its own."""
    names = [layout("detectron2", name)(key) for key in conversion.expected(name)]
    assert len(set(names)) == len(names)
    assert all(key.split(".")[0] in {"stem", "tail", *(f"res{i}" for i in range(2, 8))} for key in names)
    assert not [a for a in names for b in names if a != b and a.endswith(f".{b}")]
    assert layout("torchvision", name) is None and layout("mmdet", name) is None


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_is_found_by_its_tensors(name: str) -> None:
    with torch.device("meta"):
        tensors = network.create(name).state_dict()
    found = conversion.match(Weights("x", {**tensors, "fc.weight": torch.zeros(1)}))
    assert found.network == name and len(found.tensors) == len(conversion.expected(name))
    assert found.unused.pop("fc.weight") == "the classifier"
    assert set(found.unused.values()) == {"a step counter"}


def test_without_detectron2_there_is_nothing_to_try_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "detectron2", None)
    assert run_tool("train_detectron2", "--config", "recipe.yaml") == EXIT_USAGE
    assert "recipes/detectron2/README.md says how to install Detectron2" in capsys.readouterr().err


Damage = Callable[[dict[str, Tensor]], object]
DAMAGES: dict[str, tuple[Damage, str]] = {
    "missing": (lambda t: t.pop("layer4.1.bn2.running_var"), "layer4.1.bn2.running_var is missing"),
    "shape": (
        lambda t: t.update({"conv1.weight": torch.zeros(64, 1, 7, 7)}),
        "conv1.weight is (64, 1, 7, 7)",
    ),
    "extra": (
        lambda t: t.update({"layer1.0.se.fc1.weight": torch.zeros(1)}),
        "layer1.0.se.fc1.weight is one too",
    ),
    "cifar": (lambda t: (t.clear(), t.update(weights("resnet20"))), "no backbone: none of its 105 tensors"),
    "head": (
        lambda t: (t.clear(), t.update({"heads.0.mlp.0.weight": torch.zeros(1)})),
        "no backbone: none of",
    ),
    "empty": (lambda t: t.clear(), "no backbone: none of its 0 tensors"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=list(DAMAGES))
def test_what_would_leave_a_weight_at_its_initial_value_is_refused(
    resnet18: dict[str, Tensor],
    damage: Damage,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tensors = dict(resnet18)
    damage(tensors)
    save_file(tensors, tmp_path / "x.safetensors")
    output = tmp_path / "out.pkl"
    assert run_tool("convert_to_detectron2", tmp_path / "x.safetensors", "-o", output) == EXIT_USAGE
    error = capsys.readouterr().err
    assert message in error and "x.safetensors" in error and error.count("\n") == 1
    assert not output.exists()


def test_every_kind_of_source_gives_the_same_file(resnet18: dict[str, Tensor], tmp_path: Path) -> None:
    recipe = {"network": {"name": "resnet18", "args": {"zero_init_last": False}}}
    heads = {"heads.0.weight": torch.zeros(3)}
    inside = {f"backbone.{name}": tensor for name, tensor in resnet18.items()} | heads
    run = tmp_path / "run"
    state = {"format": FORMAT, "recipe": OmegaConf.to_yaml(recipe)}
    folder.write_files(run / "checkpoints" / "step-00000007", inside, {}, state)
    (run / "recipe.yaml").write_text(OmegaConf.to_yaml(recipe))
    unfinished = conversion.read(run).tensors  # from the checkpoint: nothing is exported yet
    save_file(resnet18, run / "backbone.safetensors")
    torch.save({"state_dict": {f"module.{k}": t for k, t in resnet18.items()}}, tmp_path / "ddp.pth")
    sources = [run, run / "checkpoints" / "step-00000007", run / "backbone.safetensors", tmp_path / "ddp.pth"]
    assert all(torch.equal(unfinished[name], tensor) for name, tensor in resnet18.items())
    shapes = {name: tensor.shape for name, tensor in inside.items()}
    for number in (1, 0):  # as two ranks write it
        halves = {n: t.flatten()[number * (k := -(-t.numel() // 2)) :][:k] for n, t in inside.items()}
        share = Share(number, 2, halves, {}, shapes)
        folder.write_share(tmp_path / "shares", "token", share, state)
    sources.append(tmp_path / "shares")
    for source in sources:
        output = tmp_path / "out.pkl"
        assert run_tool("convert_to_detectron2", source, "-o", output) == 0
        content = weight_files.read_pickle(output)
        assert (content["__author__"], content["matching_heuristics"]) == ("stagewise", True)
        arrays = content["model"]
        assert sorted(arrays) == sorted(detectron2_names(18))
        assert np.array_equal(arrays["res3.0.shortcut.norm.bias"], resnet18["layer2.0.downsample.1.bias"])
        assert np.array_equal(arrays["stem.conv1.weight"], resnet18["conv1.weight"])


OWN = Normalization((0.5, 0.4, 0.3), (0.25, 0.25, 0.2))
PIXELS = {"PIXEL_MEAN": [127.5, 102.0, 76.5], "PIXEL_STD": [63.75, 63.75, 51.0]}


def test_a_runs_own_normalization_goes_along(
    resnet18: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the run, its checkpoint and its backbone alone, into the file; of others ImageNet's is assumed, aloud."""
    views = {"mean": list(OWN.mean), "std": list(OWN.std)}
    recipe = OmegaConf.to_yaml({"network": {"name": "resnet18", "args": {}}, "views": views})
    run, output = tmp_path / "run", tmp_path / "out.pkl"
    inside = {f"backbone.{name}": tensor for name, tensor in resnet18.items()}
    checkpoint = run / "checkpoints" / "step-00000007"
    folder.write_files(checkpoint, inside, {}, {"format": FORMAT, "recipe": recipe})
    (run / "recipe.yaml").write_text(recipe)
    save_file(resnet18, run / "backbone.safetensors", {"stagewise": json.dumps({"views": views})})
    for weights in (run, checkpoint, run / "backbone.safetensors"):
        assert run_tool("convert_to_detectron2", weights, "-o", output) == 0
        assert pixels_of(output) == PIXELS
        assert (
            "normalized by mean [0.5, 0.4, 0.3], std [0.25, 0.25, 0.2]: the file" in capsys.readouterr().out
        )
    assert run_tool("convert_to_detectron2", run, "-o", tmp_path / "x.pth", "--to", "mmdet") == 0
    assert "std [0.25, 0.25, 0.2]: set this in mmdet" in capsys.readouterr().out
    save_file(resnet18, tmp_path / "elsewhere.safetensors")
    assert run_tool("convert_to_detectron2", tmp_path / "elsewhere.safetensors", "-o", output) == 0
    assert pixels_of(output) == {}
    assert "not known how images were normalized" in capsys.readouterr().out
    (run / "recipe.yaml").write_text(OmegaConf.to_yaml({"network": {"name": "resnet18", "args": {}}}))
    assert run_tool("convert_to_detectron2", run, "-o", output) == 0
    base = yaml.safe_load((RECIPES / "base.yaml").read_text())["MODEL"]
    assert pixels_of(output) == {key: base[key] for key in PIXELS}
    assert "normalized" not in capsys.readouterr().out


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_a_trained_detector_goes_on_with_its_normalization(tmp_path: Path, order: str) -> None:
    """Detectron2 writes its configuration beside the weights, in which there are no means."""
    (tmp_path / "model_final.pth").touch()
    assert pixels_of(tmp_path / "model_final.pth") == {}
    model = {key: values[:: 1 if order == "RGB" else -1] for key, values in PIXELS.items()}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"MODEL": model, "INPUT": {"FORMAT": order}}))
    assert pixels_of(tmp_path / "model_final.pth") == PIXELS


def test_weights_that_are_not_used_are_named(
    resnet18: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    average = {name: tensor + 1 for name, tensor in resnet18.items()}
    heads = {"heads.0.weight": torch.zeros(3), "fc.bias": torch.zeros(3)}
    inside = {f"module.backbone.{name}": tensor for name, tensor in resnet18.items()} | heads
    optimizer = {"state": {}, "param_groups": []}
    torch.save(
        {"epoch": 7, "state_dict": inside, "state_dict_ema": average, "optimizer": optimizer},
        tmp_path / "x.pth",
    )
    assert run_tool("convert_to_detectron2", tmp_path / "x.pth", "-o", tmp_path / "x.pkl") == 0
    said = capsys.readouterr().out
    assert "not used: 1 (weights beside state_dict, which are taken): state_dict_ema\n" in said
    assert "not used: 2 (not below backbone): heads.0.weight, fc.bias\n" in said
    assert "optimizer" not in said and "epoch" not in said
    arrays = weight_files.read_pickle(tmp_path / "x.pkl")["model"]
    assert np.array_equal(arrays["stem.conv1.weight"], resnet18["conv1.weight"])


def test_other_layouts_load_where_they_belong(resnet18: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(resnet18, tmp_path / "x.safetensors")
    for to in ("torchvision", "mmdet"):
        arguments = (tmp_path / "x.safetensors", "-o", tmp_path / f"{to}.pth", "--to", to)
        assert run_tool("convert_to_detectron2", *arguments) == 0
    net = torchvision.models.resnet18()
    outcome = net.load_state_dict(torch.load(tmp_path / "torchvision.pth"), strict=False)
    assert set(outcome.missing_keys) == {"fc.weight", "fc.bias"} and outcome.unexpected_keys == []
    ours = network.create("resnet18").eval()
    ours.load_state_dict(resnet18)
    net.fc = torch.nn.Identity()
    image = torch.rand(1, 3, 64, 64)
    assert torch.equal(net.eval()(image), ours(image))
    mmdet = torch.load(tmp_path / "mmdet.pth")["state_dict"]
    assert torch.equal(mmdet["backbone.layer4.1.bn2.bias"], resnet18["layer4.1.bn2.bias"])


class Trap:
    """A pickle of this makes a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["x.pkl", "x.pth", "x.safetensors"])
def test_pickles_from_elsewhere_are_not_run(name: str, tmp_path: Path) -> None:
    path, sprung = tmp_path / name, tmp_path / "sprung"
    path.write_bytes(pickle.dumps({"model": {"x": Trap(sprung)}, "__author__": "someone"}))
    with pytest.raises(UserError, match=name):
        conversion.read(path)
    with pytest.raises(UserError, match=r"calls posix.mkdir, so it is more than arrays"):
        weight_files.read_pickle(path)
    assert not sprung.exists()
    pickle.loads(path.read_bytes())  # the trap is a good one
    assert sprung.exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pkl"])
def test_a_damaged_file_is_named(suffix: str, resnet18: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    if suffix == ".safetensors":
        save_file(resnet18, path)
    elif suffix == ".pth":
        torch.save(resnet18, path)
    else:
        weight_files.write(path, "detectron2", "resnet18", resnet18)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=f"x{suffix}: damaged"):
        weight_files.read_pickle(path) if suffix == ".pkl" else conversion.read(path)


def test_a_run_of_a_network_that_detectors_lack_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("network: {name: presnet50, args: {pres_resize: pre}}")
    with pytest.raises(UserError, match="pres_resize"):
        conversion.read(tmp_path)
    (tmp_path / "recipe.yaml").write_text("network: {name: resnet32, args: {}}")
    with pytest.raises(UserError, match="nor a checkpoint yet"):
        conversion.read(tmp_path)
    save_file(weights("resnet32"), tmp_path / "backbone.safetensors")
    with pytest.raises(UserError, match="resnet32 can't be converted; resnet18, "):
        conversion.match(conversion.read(tmp_path))
