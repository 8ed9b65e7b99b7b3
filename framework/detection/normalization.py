"""How images were normalized in pretraining, from the weights that a detector starts from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from framework.config.views import Views
from framework.detection import weight_files


class Normalization(NamedTuple):
    """Mean and standard deviation of the channels red, green and blue; pixels are from 0 to 1.

    Attributes:
        mean: subtracted; ImageNet's unless given.
        std: divided by; ImageNet's unless given.
    """

    mean: tuple[float, ...] = Views.mean
    std: tuple[float, ...] = Views.std

    @classmethod
    def of_recipe(cls, recipe: Mapping[str, Any]) -> Normalization:
        """That of a recipe's ``views``; what it leaves out is ImageNet's."""
        views = recipe.get("views") or {}
        return cls(tuple(views.get("mean", Views.mean)), tuple(views.get("std", Views.std)))

    @property
    def pixels(self) -> dict[str, list[float]]:
        """As Detectron2 has it, for pixels from 0 to 255."""
        return {
            "PIXEL_MEAN": [round(255 * value, 3) for value in self.mean],
            "PIXEL_STD": [round(255 * value, 3) for value in self.std],
        }

    def __str__(self) -> str:
        mean, std = ([round(value, 4) for value in values] for values in self)
        return f"mean {mean}, std {std}"


def pixels_of(weights: Path) -> dict[str, list[float]]:
    """What ``MODEL.WEIGHTS`` says of ``PIXEL_MEAN`` and ``PIXEL_STD``, in RGB; empty if it says nothing.

    A converted file has them itself; Detectron2 leaves those of a trained detector in ``config.yaml`` beside it.

    Raises:
        UserError: a converted file is damaged.
    """
    if weights.suffix == ".pkl":
        found: Any = weight_files.read_pickle(weights)
        order = 1
    else:
        try:
            config = yaml.safe_load((weights.parent / "config.yaml").read_text())
            found, order = config["MODEL"], -1 if config["INPUT"]["FORMAT"] == "BGR" else 1
        except (OSError, yaml.YAMLError, KeyError, TypeError):
            return {}
    return {key: list(found[key])[::order] for key in ("PIXEL_MEAN", "PIXEL_STD") if key in found}
