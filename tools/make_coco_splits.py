"""Write the annotations of random subsets of COCO's training images: COCO-10K and COCO-1K, five of each.

    python tools/make_coco_splits.py datasets/coco [--images 10000 1000] [--splits 5]

Split S of N images becomes annotations/instances_train2017_N_splitS.json, which Detectron2 then knows as
coco_2017_train_N_splitS. Which images it holds depends on S and their numbers alone, on any machine and version; of one
split, the smaller subsets are part of the larger.
"""

from __future__ import annotations

import argparse
import json
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.console import Console

from framework.runtime.command import Parser, bounded, status
from framework.runtime.errors import UserError
from framework.runtime.files import write_whole


def main() -> None:
    """Write all subsets."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("coco", type=Path, help="folder with annotations/instances_train2017.json")
    parser.add_argument("--images", type=int, nargs="+", default=[10000, 1000], help="sizes of the subsets")
    parser.add_argument("--splits", type=bounded(int, 1), default=5, help="subsets of each size")
    arguments = parser.parse_args()
    annotations = arguments.coco / "annotations"
    with Console(stderr=True).status("reading the annotations"):
        content = read(annotations / "instances_train2017.json")
    for images in arguments.images:
        for split in range(1, arguments.splits + 1):
            part = subset(content, images, split)
            path = annotations / f"instances_train2017_{images}_split{split}.json"
            write_whole(path, json.dumps(part))
            print(f"{path}: {images} images, {len(part['annotations'])} objects", flush=True)


def read(path: Path) -> dict[str, Any]:
    """COCO's annotations.

    Raises:
        UserError: the file is missing, or no annotations.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        if not content["images"] or "annotations" not in content:
            raise KeyError
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged, or no annotations of COCO") from error
    return content


def subset(content: dict[str, Any], images: int, split: int) -> dict[str, Any]:
    """The ``images`` images whose hashes with ``split`` are smallest, with their objects, in COCO's order.

    Raises:
        UserError: there are not so many.
    """
    numbers = [image["id"] for image in content["images"]]
    if not 1 <= images <= len(numbers):
        raise UserError(
            f"--images {images}: the training set has {len(numbers)} images; must be from 1 to that"
        )
    chosen = set(sorted(numbers, key=lambda number: sha256(f"{split}/{number}".encode()).digest())[:images])
    kept = {
        "images": [image for image in content["images"] if image["id"] in chosen],
        "annotations": [item for item in content["annotations"] if item["image_id"] in chosen],
    }
    return {**content, **kept}


if __name__ == "__main__":
    sys.exit(status(main))
