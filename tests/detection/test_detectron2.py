"""With a real Detectron2: names, features, evaluators, 20 iterations on the toy sets, every configuration."""

from __future__ import annotations

import json
import os
import pickle
import runpy
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from framework import network
from framework.detection import conversion, weight_files
from framework.detection.conversion import Match, Weights
from framework.detection.layouts import NETWORKS, RESNETS, layout
from framework.detection.normalization import Normalization
from framework.runtime.errors import UserError
from framework.runtime.exit_status import EXIT_USAGE
from framework.runtime.run_lock import take
from tests.support.commands import run_tool

pytestmark = pytest.mark.detectron2
pytest.importorskip("detectron2", reason="Detectron2 is not installed; recipes/detectron2/README.md says how")

from detectron2.config import get_cfg  # noqa: E402
from detectron2.data import DatasetCatalog  # noqa: E402
from detectron2.layers import FrozenBatchNorm2d  # noqa: E402
from detectron2.modeling import build_backbone  # noqa: E402
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, PolygonMasks  # noqa: E402

from framework.detection import backbones, datasets, trainer, verification  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes" / "detectron2").glob("*.yaml"))
#: a detector that a CPU core trains for 20 iterations in less than a minute
SIZES = {
    "RESNETS.DEPTH": 18,
    "RESNETS.RES2_OUT_CHANNELS": 64,
    "FPN.OUT_CHANNELS": 64,
    "ROI_BOX_HEAD.CONV_DIM": 32,
    "ROI_BOX_HEAD.FC_DIM": 64,
    "ROI_MASK_HEAD.CONV_DIM": 32,
    "DEVICE": "cpu",
}
SMALL = [word for key, value in SIZES.items() for word in (f"MODEL.{key}", str(value))]


def drawn(name: str) -> Match:
    """A network with every tensor drawn, BatchNorms and their statistics included."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, tensor in network.create(name).state_dict().items():
        if tensor.ndim == 1:
            tensor = 0.5 + torch.rand(tensor.shape, generator=generator)
            tensor = tensor - 1 if key.endswith(("bias", "running_mean")) else 0.5 * tensor
        tensors[key] = tensor
    return conversion.match(Weights(name, tensors))


def written(match: Match, folder: Path) -> Path:
    path = folder / f"{match.network}.pkl"
    tensors = match.renamed(layout("detectron2", match.network))
    weight_files.write(path, "detectron2", match.network, tensors, match.pixels)
    return path


def recipe(name: str) -> Path:
    return ROOT / "recipes" / "detectron2" / f"{name}.yaml"


def arguments(name: str, opts: list[str], **more: Any) -> Namespace:
    defaults = {"eval_only": False, "resume": False, "split": None}
    return Namespace(config_file=str(recipe(name)), opts=opts, **{**defaults, **more})


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Both toy sets, where Detectron2 looks for the real ones."""
    root = tmp_path_factory.mktemp("toys")
    make = runpy.run_path(str(ROOT / "tools" / "make_toy_coco.py"))
    for kind in ("coco", "cityscapes"):
        make[f"make_{kind}"](root, 9)
    here = Path.cwd()
    assert "DETECTRON2_DATASETS" not in os.environ, "unset it: these tests bring their own sets"
    (root / "datasets").symlink_to(root)
    os.chdir(root)
    yield root
    os.chdir(here)


@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_those_of_the_network_converted(name: str, tmp_path: Path) -> None:
    match = drawn(name)
    levels = verification.compare(match, written(match, tmp_path))
    assert [level.shape[2:] for level in levels] == [(48, 56), (24, 28), (12, 14), (6, 7)]
    for level in levels:
        assert level.largest > 0.1
        assert level.difference == 0 if name in RESNETS else level.difference < 1e-5 * level.largest
    verification.check(levels)


def test_a_wrong_tensor_is_seen(tmp_path: Path) -> None:
    match = drawn("resnet18")
    path = written(match, tmp_path)
    match.tensors["layer3.1.bn2.running_mean"][0] += 1
    levels = verification.compare(match, path)
    assert [level.difference > 0 for level in levels] == [False, False, True, True]
    with pytest.raises(UserError, match="res4 differs"):
        verification.check(levels)


@pytest.mark.parametrize(("c5", "channels"), [("conv5_x", 1952), ("conv6", 2048)])
def test_shufflenet_ends_where_it_is_told(c5: str, channels: int) -> None:
    cfg = get_cfg()
    backbones.add_config(cfg)
    backbones.configure(cfg, "shufflenetv2_50")
    cfg.MODEL.SHUFFLENET.C5 = c5
    features = build_backbone(cfg).bottom_up(torch.zeros(1, 3, 64, 64))
    assert features["res5"].shape == (1, channels, 2, 2)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_configuration_builds_the_detector_of_the_protocol(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = trainer.configuration(path, ["MODEL.DEVICE", "cpu"])
    assert capsys.readouterr().out.count("warning: on the CPU SyncBN is BN") == 1
    model = trainer.Trainer.build_model(cfg)
    bottom_up = model.backbone.bottom_up
    trained = {name.split(".")[0] for name, p in bottom_up.named_parameters() if p.requires_grad}
    stages = {name for name, _ in bottom_up.named_children()}
    if (
        "frozen" in path.stem
        or "toy" in path.stem
        or path.stem in ("coco_1x_supervised", "cityscapes_64ep_supervised")
    ):
        assert trained == set()
    elif "random" in path.stem:
        assert trained == stages
    elif path.stem != "base":
        assert trained == stages - {"stem", "res2"}
    box = model.roi_heads.box_head
    assert [name for name, child in box.named_children() if name.startswith(("conv", "fc"))] == [
        *("conv1", "conv2", "conv3", "conv4"),
        *("fc1", "fc_relu1"),
    ]
    new = [
        model.backbone.fpn_lateral2,
        model.backbone.fpn_output5,
        box.conv4,
        model.roi_heads.mask_head.mask_fcn4,
    ]
    assert all(isinstance(layer.norm, nn.BatchNorm2d) for layer in new)


def test_frozen_statistics_can_be_those_of_the_batch() -> None:
    opts = [*SMALL, "MODEL.BACKBONE.FROZEN_BN", "batch"]
    model = trainer.Trainer.build_model(trainer.configuration(recipe("toy_coco"), opts))
    norms = [m for m in model.backbone.bottom_up.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 20
    assert not any(isinstance(m, FrozenBatchNorm2d) for m in model.backbone.bottom_up.modules())
    assert not any(p.requires_grad for p in model.backbone.bottom_up.parameters())


@pytest.mark.parametrize(
    ("name", "network_name"),
    [("toy_coco", "resnet18"), ("toy_cityscapes", "resnet18"), ("toy_coco", "shufflenetv2_50")],
)
def test_twenty_iterations_lower_the_loss_and_leave_the_backbone(
    name: str, network_name: str, toys: Path, tmp_path: Path
) -> None:
    match = drawn(network_name)
    opts = [*SMALL, "MODEL.WEIGHTS", str(written(match, tmp_path)), "OUTPUT_DIR", str(tmp_path)]
    if network_name == "shufflenetv2_50":
        opts += ["MODEL.BACKBONE.NAME", "build_shufflenetv2_50_fpn_backbone"]
    cfg = trainer.configuration(recipe(name), opts)
    datasets.prepare([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
    torch.manual_seed(0)
    mask_rcnn = trainer.Trainer(cfg)
    mask_rcnn.resume_or_load(resume=False)
    mask_rcnn.train()
    losses = [loss for loss, _ in mask_rcnn.storage.history("total_loss").values()]
    assert len(losses) == 20
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5]), losses
    trained = torch.load(tmp_path / "model_final.pth")["model"]
    frozen = match.renamed(layout("detectron2", network_name))
    kept = {key: t for key, t in frozen.items() if not key.startswith("tail.")}  # conv6, which C5 leaves out
    assert all(torch.equal(trained[f"backbone.bottom_up.{key}"], tensor) for key, tensor in kept.items())
    backbone = [key for key in trained if key.startswith("backbone.bottom_up.") and "num_batches" not in key]
    assert len(kept) == len(backbone)
    result = json.loads((tmp_path / "result.json").read_text())
    assert {"bbox", "segm"} < set(result) and result["weights"].endswith(f"{network_name}.pkl")


def ground_truth(record: dict[str, Any]) -> Instances:
    """What a perfect detector finds on an image."""
    height, width = record["height"], record["width"]
    items = record["annotations"]
    boxes = [BoxMode.convert(item["bbox"], item["bbox_mode"], BoxMode.XYXY_ABS) for item in items]
    polygons = PolygonMasks([[np.asarray(p) for p in item["segmentation"]] for item in items])
    found = Instances((height, width))
    found.pred_boxes = Boxes(torch.tensor(boxes))
    found.pred_classes = torch.tensor([item["category_id"] for item in items])
    found.pred_masks = BitMasks.from_polygon_masks(polygons, height, width).tensor
    found.scores = torch.ones(len(items))
    return found


@pytest.mark.parametrize("name", ["coco_2017_val", "cityscapes_fine_instance_seg_val"])
def test_evaluators_give_the_truth_full_marks(name: str, toys: Path, tmp_path: Path) -> None:
    datasets.prepare([name])
    records = DatasetCatalog.get(name)
    assert len(records) == 3
    for spoil, expected in ((False, 100.0), (True, 0.0)):
        evaluator = datasets.evaluator(name, str(tmp_path / str(spoil)))
        evaluator.reset()
        for record in records:
            found = ground_truth(record)
            if spoil:
                found.pred_classes = (found.pred_classes + 1) % 8  # a class that no toy is of, or another one
            evaluator.process([record], [{"instances": found}])
        scores = evaluator.evaluate()
        if spoil:
            assert scores["bbox"]["AP"] < 50 and scores["segm"]["AP"] < 50
        else:
            assert scores["bbox"]["AP"] == pytest.approx(expected, abs=1)
            assert scores["segm"]["AP"] == pytest.approx(expected, abs=15)  # edges of 20 pixel shapes


def test_a_subset_is_registered_by_its_name(toys: Path) -> None:
    splits = runpy.run_path(str(ROOT / "tools" / "make_coco_splits.py"))
    folder = toys / "coco" / "annotations"
    part = splits["subset"](splits["read"](folder / "instances_train2017.json"), 4, 2)
    (folder / "instances_train2017_4_split2.json").write_text(json.dumps(part))
    opts = ["DATASETS.TRAIN", "('coco_2017_train_4_split1',)", "MODEL.DEVICE", "cpu"]
    cfg = trainer.configuration(recipe("coco_1k_finetune"), opts, split=2)
    assert cfg.DATASETS.TRAIN == ("coco_2017_train_4_split2",) and cfg.OUTPUT_DIR.endswith("finetune/split2")
    datasets.prepare(cfg.DATASETS.TRAIN)
    names = [Path(record["file_name"]).name for record in DatasetCatalog.get("coco_2017_train_4_split2")]
    assert names == [image["file_name"] for image in part["images"]]


class Trap:
    """A pickle of this makes a folder when it is loaded."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("sprung",)


MISTAKES = {
    "no weights": ("coco_1x_frozen", "", "MODEL.WEIGHTS is empty and MODEL.BACKBONE.FREEZE_AT=5"),
    "no file": ("toy_coco", "MODEL.WEIGHTS none.pkl", "none.pkl: no such file"),
    "trap": ("toy_coco", "MODEL.WEIGHTS trap.pkl", "trap.pkl: calls posix.mkdir"),
    "trap.pth": ("toy_coco", "MODEL.WEIGHTS trap.pth", "trap.pth: damaged, or holds more than tensors"),
    "safetensors": ("toy_coco", "MODEL.WEIGHTS x.safetensors", "x.safetensors: convert it first"),
    "other network": (
        "toy_coco",
        "MODEL.WEIGHTS resnet18.pkl OUTPUT_DIR out",
        "its 100 tensors of resnet18 fill 77 of the 265",
    ),
    "key": ("toy_coco", "MODEL.WEIGHT x", "Non-existent key: MODEL.WEIGHT"),
    "value": ("toy_coco", "SOLVER.MAX_ITER many", "Type mismatch"),
    "set": ("toy_coco", "DATASETS.TRAIN ('coco_10k',)", "DATASETS: coco_10k: unknown"),
    "subset": (
        "coco_10k_finetune",
        "MODEL.WEIGHTS resnet18.pkl",
        "instances_train2017_10000_split1.json: missing (tools/make_coco_splits.py",
    ),
}


@pytest.mark.parametrize(("name", "opts", "message"), MISTAKES.values(), ids=list(MISTAKES))
def test_mistakes_are_told_in_one_line(name: str, opts: str, message: str, toys: Path) -> None:
    for trap in ("trap.pkl", "trap.pth"):
        Path(trap).write_bytes(pickle.dumps({"model": Trap(), "__author__": "someone"}, protocol=2))
    Path("x.safetensors").touch()
    written(drawn("resnet18"), toys)
    with pytest.raises(UserError) as caught:
        trainer.run(arguments(name, ["MODEL.DEVICE", "cpu", *opts.split()]))
    assert message in str(caught.value).replace("\n", " ")
    assert not Path("sprung").exists()


@pytest.mark.parametrize(
    ("weights", "message"),
    [("none.pkl", "none.pkl: no such file"), ("resnet18.pkl", "would keep its initial value")],
    ids=["before it", "in it"],
)
def test_a_mistake_ends_the_launch_of_several_processes(weights: str, message: str, toys: Path) -> None:
    """With the exit status after which Slurm doesn't try again. Training itself takes GPUs."""
    written(drawn("resnet18"), toys)
    tool = [sys.executable, str(ROOT / "tools" / "train_detectron2.py"), "--num-gpus", "2", "--eval-only"]
    opts = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", weights, "OUTPUT_DIR", "out"]
    command = [*tool, "--config", str(recipe("toy_coco")), *opts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == EXIT_USAGE
    assert message in done.stderr and "Traceback" not in done.stderr


def test_two_trainings_in_one_folder(toys: Path, tmp_path: Path) -> None:
    other = take(tmp_path / "run")
    weights = ["MODEL.WEIGHTS", str(written(drawn("resnet18"), tmp_path))]
    with pytest.raises(UserError, match=r"is the folder of a run that is going on.*set another OUTPUT_DIR"):
        trainer.run(arguments("toy_coco", [*SMALL, "OUTPUT_DIR", str(tmp_path / "run"), *weights]))
    other.release()


def test_missing_sets_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("coco_2017_train", "cityscapes_fine_instance_seg_train"):
        with pytest.raises(
            UserError, match=f"missing; DETECTRON2_DATASETS=datasets must hold the set {name}"
        ):
            datasets.prepare([name])


def test_a_detector_evaluates_resumes_and_draws(toys: Path, tmp_path: Path) -> None:
    """Two iterations, two more from the checkpoint, evaluation of the result, a picture by it."""
    opts = [*SMALL, "OUTPUT_DIR", str(tmp_path / "run"), "TEST.PRECISE_BN.ENABLED", "False"]
    own = Normalization((0.5, 0.4, 0.3), (0.25, 0.25, 0.2))
    weights = ["MODEL.WEIGHTS", str(written(replace(drawn("resnet18"), normalization=own), tmp_path))]
    trainer.run(arguments("toy_coco", [*opts, *weights, "SOLVER.MAX_ITER", "2"]))
    first = torch.load(tmp_path / "run" / "model_final.pth")
    trainer.run(arguments("toy_coco", [*opts, *weights, "SOLVER.MAX_ITER", "4"], resume=True))
    last = torch.load(tmp_path / "run" / "model_final.pth")
    assert (first["iteration"], last["iteration"]) == (1, 3)
    assert not torch.equal(*(c["model"]["proposal_generator.rpn_head.conv.weight"] for c in (first, last)))

    (tmp_path / "run" / "result.json").unlink()
    final = ["MODEL.WEIGHTS", str(tmp_path / "run" / "model_final.pth")]
    for said in (weights, final):  # the detector normalizes as its backbone was trained
        model = trainer.Trainer.build_model(trainer.configuration(recipe("toy_coco"), [*opts, *said]))
        assert model.pixel_mean.flatten().tolist() == [127.5, 102.0, 76.5]
        assert model.pixel_std.flatten().tolist() == [63.75, 63.75, 51.0]
    bgr = trainer.configuration(recipe("toy_coco"), [*final, "INPUT.FORMAT", "BGR"]).MODEL
    assert bgr.PIXEL_MEAN == [76.5, 102.0, 127.5]
    asked = ["MODEL.PIXEL_MEAN", "[1.0, 2.0, 3.0]"]
    assert trainer.configuration(recipe("toy_coco"), [*final, *asked]).MODEL.PIXEL_MEAN == [1, 2, 3]
    trainer.run(arguments("toy_coco", [*opts, *final], eval_only=True))
    assert (tmp_path / "run" / "result.json").exists()
    with pytest.raises(UserError, match="would keep its initial value"):
        trainer.run(arguments("toy_coco", [*opts, *weights], eval_only=True))

    image = next((toys / "coco" / "val2017").glob("*.jpg"))
    where = ["--config", recipe("toy_coco"), "-o", tmp_path / "pictures"]
    assert run_tool("draw_detections", image, *where, "--score", 0, "--opts", *SMALL, *final) == 0
    drawn_image, original = Image.open(tmp_path / "pictures" / f"{image.stem}.png"), Image.open(image)
    assert drawn_image.size == original.size
    assert np.array_equal(np.array(drawn_image), np.array(original)) is False
