"""Subsets of COCO, toy sets, averages over splits, pictures, and how long protocols last; without Detectron2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image

from framework.runtime.exit_status import EXIT_USAGE
from tests.support.commands import run_tool, tool

ROOT = Path(__file__).resolve().parents[2]


RECIPES = ROOT / "recipes" / "detectron2"


def annotations(images: int) -> dict[str, Any]:
    """Images with numbers far apart, one or two objects each."""
    numbers = range(7, 7 + 3 * images, 3)
    objects = [{"id": 10 * n + i, "image_id": n} for n in numbers for i in range(1 + n % 2)]
    return {"categories": ["x"], "images": [{"id": n} for n in numbers], "annotations": objects}


def test_subsets_depend_on_split_and_image_numbers_alone() -> None:
    subset = tool("make_coco_splits")["subset"]
    content = annotations(500)
    chosen = {split: [i["id"] for i in subset(content, 50, split)["images"]] for split in range(1, 6)}
    # Recorded: another machine, Python or order in the file must not change them.
    assert chosen[1][:6] == GOLDEN
    backwards = {**content, "images": content["images"][::-1]}
    assert {i["id"] for i in subset(backwards, 50, 1)["images"]} == set(chosen[1])
    assert {i["id"] for i in subset(content, 10, 1)["images"]} < set(chosen[1])
    for split, numbers in chosen.items():
        assert len(set(numbers)) == 50
        kept = subset(content, 50, split)
        assert kept["categories"] == ["x"]
        expected = [item["id"] for item in content["annotations"] if item["image_id"] in set(numbers)]
        assert [item["id"] for item in kept["annotations"]] == expected
    overlaps = [len(set(chosen[a]) & set(chosen[b])) for a in chosen for b in chosen if a < b]
    assert max(overlaps) < 15  # 5 by chance
    counts = sum(np.bincount(np.searchsorted(range(7, 1507, 300), chosen[s]), minlength=6) for s in chosen)
    assert min(counts[1:]) > 25  # 50 by chance: every part of the numbers is drawn from


GOLDEN = [37, 85, 91, 103, 145, 172]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("toys")
    make = tool("make_toy_coco")
    for kind in ("coco", "cityscapes"):
        make[f"make_{kind}"](root, 6)
    return root


def test_toy_coco_shows_what_it_says(toys: Path) -> None:
    shapes = {shape.coco: shape for shape in tool("make_toy_coco")["SHAPES"]}
    for split, images in (("train", 6), ("val", 2)):
        content = json.loads((toys / f"coco/annotations/instances_{split}2017.json").read_text())
        names = {category["id"]: category["name"] for category in content["categories"]}
        assert len(names) == 80 and (names[1], names[13], names[90]) == ("person", "stop sign", "toothbrush")
        assert len(content["images"]) == images
        for item in content["annotations"]:
            picture = Image.open(toys / f"coco/{split}2017/{item['image_id']:012d}.jpg")
            x, y, width, height = item["bbox"]
            inside = picture.getpixel((round(x + width / 2), round(y + height / 2)))
            assert np.abs(np.subtract(inside, shapes[names[item["category_id"]]].color)).max() < 12
            assert 0.4 < item["area"] / (width * height) < 1.01
            xs, ys = np.reshape(item["segmentation"], (-1, 2)).T
            assert (xs.min(), ys.min(), np.ptp(xs), np.ptp(ys)) == (x, y, width, height)


def test_toy_cityscapes_maps_agree_with_polygons(toys: Path) -> None:
    truths = sorted((toys / "cityscapes/gtFine").glob("*/toytown/*_gtFine_polygons.json"))
    assert len(truths) == 8
    for path in truths:
        content = json.loads(path.read_text())
        stem = str(path).removesuffix("polygons.json")
        instances = np.array(Image.open(f"{stem}instanceIds.png"))
        labels = np.array(Image.open(f"{stem}labelIds.png"))
        assert instances.dtype == np.uint16 or instances.max() < 2**16
        assert np.array_equal(np.where(instances < 1000, instances, instances // 1000), labels)
        assert len(np.unique(instances)) == len(content["objects"])  # the road is one of them
        picture = (
            str(path).replace("gtFine_polygons.json", "leftImg8bit.png").replace("gtFine", "leftImg8bit")
        )
        assert Image.open(picture).size == (content["imgWidth"], content["imgHeight"]) == labels.shape[::-1]


def test_toy_sets_are_the_same_every_time_and_spare_what_is_there(
    toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool("make_toy_coco", tmp_path, "--images", 6) == 0
    made = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert made == {p.relative_to(toys): p.read_bytes() for p in toys.rglob("*") if p.is_file()}
    assert run_tool("make_toy_coco", tmp_path, "--images", 9) == EXIT_USAGE
    assert "exists already" in capsys.readouterr().err
    assert made == {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_splits_are_averaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split, ap in ((1, 10.0), (2, 11.0), (10, 13.5)):
        folder = tmp_path / f"split{split}"
        folder.mkdir()
        result = {"test": ["coco_2017_val"], "bbox": {"AP": ap, "AP50": 20.0}, "segm": {"AP": ap / 2}}
        (folder / "result.json").write_text(json.dumps(result))
    assert run_tool("average_splits", tmp_path) == 0
    average = json.loads((tmp_path / "average.json").read_text())
    assert average["splits"] == ["split1", "split2", "split10"]
    assert average["bbox"]["AP"] == {"mean": pytest.approx(11.5), "spread": 3.5}
    assert average["segm"]["AP"] == {"mean": pytest.approx(5.75), "spread": 1.75}
    (tmp_path / "split2" / "result.json").unlink()
    assert run_tool("average_splits", tmp_path) == EXIT_USAGE
    assert "split2/result.json: can't be read" in capsys.readouterr().err


def test_pictures_color_the_object_and_nothing_else() -> None:
    draw = tool("draw_detections")["draw"]
    image = torch.full((3, 120, 160), 128, dtype=torch.uint8)
    masks = torch.zeros(1, 120, 160, dtype=torch.bool)
    masks[0, 60:80, 60:80] = True
    box = torch.tensor([[50.0, 50.0, 90.0, 90.0]])
    drawn = draw(image, box, masks, ["kite"], torch.tensor([0.9]))
    changed = (drawn != image).any(0)
    assert changed[60:80, 60:80].all() and changed[50, 50:90].all()
    assert not changed[95:].any() and not changed[:, 150:].any()
    assert torch.equal(draw(image, box[:0], masks[:0], [], torch.zeros(0)), image)


def protocol(name: str) -> dict[str, Any]:
    """A recipe and those it is based on, the nearer going first."""
    content = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    base = protocol(content.pop("_BASE_").removesuffix(".yaml")) if "_BASE_" in content else {}
    return OmegaConf.to_container(OmegaConf.merge(base, content))


@pytest.mark.parametrize(
    ("name", "images", "epochs"),
    [
        ("coco_1x_frozen", 118_287, 12.2),
        ("cityscapes_64ep_frozen", 2975, 64),
        ("coco_10k_finetune", 10_000, 96),
        ("coco_1k_finetune", 1000, 240),
    ],
)
def test_protocols_last_as_long_as_the_papers_say(name: str, images: int, epochs: float) -> None:
    solver = protocol(name)["SOLVER"]
    assert solver["MAX_ITER"] * solver["IMS_PER_BATCH"] / images == pytest.approx(epochs, rel=0.01)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_protocol_normalizes_as_pretraining_does(path: Path) -> None:
    model = protocol(path.stem)["MODEL"]
    assert np.allclose(np.array(model["PIXEL_MEAN"]) / 255, (0.485, 0.456, 0.406), atol=1e-3)
    assert np.allclose(np.array(model["PIXEL_STD"]) / 255, (0.229, 0.224, 0.225), atol=1e-3)
    assert protocol(path.stem)["INPUT"]["FORMAT"] == "RGB"
