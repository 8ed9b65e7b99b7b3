"""Draw what a trained detector finds on images, as PNG: boxes, masks, classes and scores.

    python tools/draw_detections.py --config recipes/detectron2/coco_10k_finetune.yaml -o pictures IMAGE... \\
        --opts MODEL.WEIGHTS runs/detectron2/coco_10k_finetune/split1/model_final.pth
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import track

from framework.runtime.command import Parser, bounded, status
from framework.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def main() -> None:
    """Draw."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path, help="images to look at")
    parser.add_argument(
        "--config", required=True, type=Path, help="configuration that the detector was trained with"
    )
    parser.add_argument("-o", "--output", required=True, type=Path, help="folder for IMAGE.png")
    parser.add_argument(
        "--score", type=bounded(float, 0, 1), default=0.5, help="least score of what is drawn"
    )
    parser.add_argument("--opts", nargs="*", default=[], help="KEY VALUE ..., MODEL.WEIGHTS at least")
    arguments = parser.parse_args()

    from PIL import Image

    try:
        detector = load(arguments.config, arguments.score, arguments.opts)
        arguments.output.mkdir(parents=True, exist_ok=True)
        for path in track(arguments.images, "drawing"):
            picture = draw(*detector.find(_read(path)))
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(arguments.output / f"{path.stem}.png")
    except OSError as error:
        raise UserError(str(error)) from error
    print(f"{len(arguments.images)} pictures in {arguments.output}")


def load(config: Path, score: float, opts: list[str]) -> Any:
    """A detector with its weights, which leaves out what scores less than ``score``.

    Raises:
        UserError: Detectron2 or a file is missing, or the weights are not those of the whole detector.
    """
    try:
        from framework.detection.detector import Detector
    except ModuleNotFoundError as error:
        raise UserError(f"{error}: recipes/detectron2/README.md says how to install Detectron2") from error
    return Detector(config, [*opts, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", str(score)])


def draw(image: Tensor, boxes: Tensor, masks: Tensor, names: list[str], scores: Tensor) -> Tensor:
    """One color an object, over the image.

    Args:
        image: (3, H, W) uint8.
        boxes: (N, 4) as x0, y0, x1, y1 in pixels.
        masks: (N, H, W) bool.
        names: classes of the objects.
        scores: (N,) between 0 and 1.

    Returns:
        (3, H, W) uint8.
    """
    from matplotlib import colormaps
    from matplotlib.font_manager import findfont
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

    if not len(boxes):
        return image
    wheel = colormaps["tab10"]
    colors = [tuple(round(255 * c) for c in wheel(i % wheel.N)[:3]) for i in range(len(boxes))]
    labels = [f"{name} {score:.0%}" for name, score in zip(names, scores.tolist(), strict=True)]
    size = max(10, image.shape[1] // 40)
    drawn = draw_segmentation_masks(image, masks, alpha=0.45, colors=colors)
    return draw_bounding_boxes(
        drawn,
        boxes,
        labels,
        colors,
        width=max(1, size // 8),
        font=findfont("DejaVu Sans"),
        font_size=size,
        label_colors="white",
        fill_labels=True,
    )


def _read(path: Path) -> Tensor:
    """(3, H, W) uint8, RGB."""
    import numpy as np
    import torch
    from PIL import Image, UnidentifiedImageError

    try:
        return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{path}: no image that can be read") from error


if __name__ == "__main__":
    sys.exit(status(main))
