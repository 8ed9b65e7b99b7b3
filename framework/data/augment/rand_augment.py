"""RandAugment (Cubuk et al. 2020): timm's, with random numbers that depend on the view alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import posterize, rand_augment_transform
from torch import Tensor

from framework.data.augment.drawing import generators_kept, seed_generators


def rand_augmented(view: Tensor, policy: str, mean: tuple[float, ...], seed: int) -> Tensor:
    """(3, S, S) uint8: a view after random operations.

    Args:
        view: (3, S, S) uint8.
        policy: in timm's words.
        mean: of the channels, from 0 to 1; what is moved in from outside the view has this color.
        seed: of all that is drawn.
    """
    transform = _transform(policy, view.shape[-1], mean)
    with generators_kept():
        seed_generators(seed)
        image = transform(Image.fromarray(view.permute(1, 2, 0).numpy()))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@cache
def _transform(policy: str, size: int, mean: tuple[float, ...]) -> Callable[[Image.Image], Image.Image]:
    """As timm's ``transforms_imagenet_train`` makes it."""
    settings = {
        "translate_const": int(0.45 * size),
        "img_mean": tuple(max(0, min(255, round(255 * channel))) for channel in mean),
        "interpolation": Image.Resampling.BICUBIC,  # as crops
    }
    transform = rand_augment_transform(policy, settings)
    for operation in transform.ops:
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterized
    return cast("Callable[[Image.Image], Image.Image]", transform)


def _posterized(image: Image.Image, bits: int, **settings: Any) -> Image.Image:
    """timm's, which at the largest magnitudes asks Pillow for 0 bits: black, which newer Pillows refuse to make."""
    if bits <= 0:
        return Image.new(image.mode, image.size)
    return cast("Image.Image", posterize(image, bits, **settings))
