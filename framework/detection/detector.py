"""A trained detector on single images."""

from __future__ import annotations

from pathlib import Path

import detectron2.data.transforms as T
import torch
from detectron2.data import MetadataCatalog
from torch import Tensor

from framework.detection import trainer, verification


class Detector:
    """The detector of a configuration with its weights, in evaluation mode.

    Args:
        config: YAML file that it was trained with.
        opts: ``KEY VALUE`` overrides, ``MODEL.WEIGHTS`` among them.

    Raises:
        UserError: a file is missing or damaged, or the weights are not those of the whole detector.
    """

    def __init__(self, config: Path, opts: list[str]) -> None:
        cfg = trainer.configuration(config, opts)
        self.classes = MetadataCatalog.get(cfg.DATASETS.TEST[0]).thing_classes
        self.model = trainer.Trainer.build_model(cfg).eval()
        verification.load(self.model, Path(cfg.MODEL.WEIGHTS), "")
        self.resize = T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)

    @torch.no_grad()
    def find(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, list[str], Tensor]:
        """What is on an image (3, H, W) uint8, RGB.

        Returns:
            The image, boxes (N, 4) as x0, y0, x1, y1 in pixels, masks (N, H, W) bool, class names, scores (N,).
        """
        pixels = image.permute(1, 2, 0).numpy()
        resized = self.resize.get_transform(pixels).apply_image(pixels)
        x = torch.as_tensor(resized.astype("float32")).permute(2, 0, 1)
        height, width = image.shape[1:]
        (output,) = self.model([{"image": x, "height": height, "width": width}])
        found = output["instances"].to("cpu")
        names = [self.classes[number] for number in found.pred_classes.tolist()]
        return image, found.pred_boxes.tensor, found.pred_masks, names, found.scores
