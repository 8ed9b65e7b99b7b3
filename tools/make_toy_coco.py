"""Make a tiny COCO and a tiny Cityscapes of drawn shapes, in the folders of the real ones.

    python tools/make_toy_coco.py datasets [--images 24]

Detectron2 finds them as it finds the real sets: below ./datasets, or below $DETECTRON2_DATASETS. Every image
holds a few shapes that don't overlap, each with its polygon; a shape is always of the same class.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from framework.runtime.command import Parser, bounded, status
from framework.runtime.errors import UserError

SIZE = (192, 128)  # width and height in pixels
CELLS = (3, 2)  # at most one shape in each
CITY = "toytown"
ROAD = 7  # Cityscapes' number of what everything stands on


class Shape(NamedTuple):
    """A regular polygon, and what it stands for in both sets.

    Attributes:
        corners: number of corners.
        color: red, green and blue.
        coco: class name of COCO.
        city: class name and number of Cityscapes.
    """

    corners: int
    color: tuple[int, int, int]
    coco: str
    city: tuple[str, int]


SHAPES = (
    Shape(3, (220, 60, 50), "kite", ("person", 24)),
    Shape(4, (60, 120, 220), "book", ("car", 26)),
    Shape(8, (230, 190, 40), "stop sign", ("bus", 28)),
    Shape(24, (70, 180, 90), "sports ball", ("bicycle", 33)),
)


class Scene(NamedTuple):
    """An image and its shapes with their corners, (x, y) in pixels."""

    image: Image.Image
    objects: list[tuple[Shape, list[tuple[int, int]]]]


def main() -> None:
    """Draw."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dest", type=Path, help="folder to put coco/ and cityscapes/ into")
    parser.add_argument(
        "--images", type=bounded(int, 3), default=24, help="of each training split; validation has a third"
    )
    arguments = parser.parse_args()
    for make in (make_coco, make_cityscapes):
        print(f"{make(arguments.dest, arguments.images)}: {arguments.images} training images")


def make_coco(dest: Path, images: int) -> Path:
    """Write ``DEST/coco``: images and ``annotations/instances_{train,val}2017.json`` with all 80 classes.

    Raises:
        UserError: there is something already, or it can't be written.
    """
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

    names = MaskRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"]
    categories = [
        {"id": number, "name": name, "supercategory": "toy"}
        for number, name in enumerate(names)
        if name not in ("__background__", "N/A")
    ]
    numbers = {category["name"]: category["id"] for category in categories}
    root = _new_folder(dest / "coco")
    for split, scenes in _splits(images):
        folder = root / f"{split}2017"
        folder.mkdir()
        content: dict[str, Any] = {"info": {}, "licenses": [], "categories": categories}
        content |= {"images": [], "annotations": []}
        for number, scene in scenes:
            name = f"{number:012d}.jpg"
            scene.image.save(folder / name, quality=95)
            content["images"].append({"id": number, "file_name": name, "width": SIZE[0], "height": SIZE[1]})
            for shape, corners in scene.objects:
                annotation = {"id": len(content["annotations"]) + 1, "image_id": number, "iscrowd": 0}
                annotation |= {"category_id": numbers[shape.coco], **_outline(corners)}
                content["annotations"].append(annotation)
        path = root / "annotations" / f"instances_{split}2017.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return root


def make_cityscapes(dest: Path, images: int) -> Path:
    """Write ``DEST/cityscapes``: ``leftImg8bit`` and ``gtFine`` with polygons, label and instance numbers.

    Raises:
        UserError: there is something already, or it can't be written.
    """
    root = _new_folder(dest / "cityscapes")
    for split, scenes in _splits(images):
        pictures, truth = (root / kind / split / CITY for kind in ("leftImg8bit", "gtFine"))
        for folder in (pictures, truth):
            folder.mkdir(parents=True)
        for number, scene in scenes:
            stem = f"{CITY}_{number:06d}_000019"
            scene.image.save(pictures / f"{stem}_leftImg8bit.png")
            labels, instances = _city_maps(scene)
            labels.save(truth / f"{stem}_gtFine_labelIds.png")
            instances.save(truth / f"{stem}_gtFine_instanceIds.png")
            (truth / f"{stem}_gtFine_polygons.json").write_text(json.dumps(_city_polygons(scene)))
    return root


def _splits(images: int) -> Iterator[tuple[str, Iterator[tuple[int, Scene]]]]:
    """Training and validation: numbers from 1 with scenes; a number is the scene's seed."""
    if images < 3:
        raise UserError(f"--images {images}: must be at least 3, so that validation has one")
    validation = images // 3
    yield "train", ((n, _draw(n)) for n in range(1, images + 1))
    yield "val", ((n, _draw(n)) for n in range(images + 1, images + validation + 1))


def _draw(seed: int) -> Scene:
    """Two shapes or more, of random size, place and turn, each within its cell, on noise."""
    random = np.random.default_rng(seed)
    width, height = SIZE
    noise = random.integers(90, 130, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    pen = ImageDraw.Draw(image)
    side = width // CELLS[0]
    cells = [(column, row) for column in range(CELLS[0]) for row in range(CELLS[1])]
    objects = []
    for index in random.permutation(len(cells))[: random.integers(2, len(cells) + 1)]:
        shape = SHAPES[random.integers(len(SHAPES))]
        radius = random.uniform(0.25, 0.45) * side
        center = (np.array(cells[index]) + 0.5) * side
        angles = random.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(shape.corners) / shape.corners
        points = center + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        corners = [(round(x), round(y)) for x, y in points.tolist()]
        pen.polygon(corners, fill=shape.color)
        objects.append((shape, corners))
    return Scene(image, objects)


def _outline(corners: list[tuple[int, int]]) -> dict[str, Any]:
    """Polygon, box (x, y, width, height) and area (the shoelace formula) in COCO's terms."""
    x, y = np.array(corners, dtype=float).T
    area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    box = [x.min(), y.min(), x.max() - x.min(), y.max() - y.min()]
    return {
        "segmentation": [[float(v) for point in corners for v in point]],
        "bbox": box,
        "area": float(area),
    }


def _city_maps(scene: Scene) -> tuple[Image.Image, Image.Image]:
    """Per pixel the label, and 1000 * label + count for what can be counted."""
    labels, instances = Image.new("L", SIZE, ROAD), Image.new("I", SIZE, ROAD)
    for count, (shape, corners) in enumerate(scene.objects):
        ImageDraw.Draw(labels).polygon(corners, fill=shape.city[1])
        ImageDraw.Draw(instances).polygon(corners, fill=1000 * shape.city[1] + count)
    return labels, Image.fromarray(np.asarray(instances).astype(np.uint16))


def _city_polygons(scene: Scene) -> dict[str, Any]:
    width, height = SIZE
    ground = {"label": "road", "polygon": [[0, 0], [width, 0], [width, height], [0, height]]}
    things = [
        {"label": shape.city[0], "polygon": [list(c) for c in corners]} for shape, corners in scene.objects
    ]
    return {"imgWidth": width, "imgHeight": height, "objects": [ground, *things]}


def _new_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True)
    except FileExistsError as error:
        raise UserError(f"{path}: exists already, and may be the real set; give another folder") from error
    except OSError as error:
        raise UserError(f"{path}: can't be made: {error.strerror}") from error
    return path


if __name__ == "__main__":
    sys.exit(status(main))
