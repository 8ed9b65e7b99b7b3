"""How views of an image are made: the ``views:`` section of a recipe.

``framework/data/augment/views.py`` makes them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from framework.config.schema import NonNegative, NonNegativeInt, Positive, Probability
from framework.runtime.errors import UserError

# One number for all views, or one for each.
Probabilities: TypeAlias = Probability | Annotated[tuple[Probability, ...], Field(min_length=1)]
Strengths: TypeAlias = NonNegative | Annotated[tuple[NonNegative, ...], Field(min_length=1)]
#: What timm's ``rand_augment_transform`` takes; it passes over or fails at anything else.
RAND_AUGMENT = re.compile(
    r"rand(-(m\d+|n[1-9]|p(0|1(\.0+)?|0?\.\d+)|mstd\d+(\.\d+)?|mmax[1-9]\d*|inc[01]|t(weights|3aw?)))*"
)
PER_VIEW = ("flip", "jitter_strength", "jitter_probability", "grayscale", "blur", "solarize")


@dataclass(frozen=True)
class Views:
    """How views are made; the defaults are SimCLR's for ImageNet.

    Probabilities and ``jitter_strength`` are numbers, or lists with one for each view of an image, in order.

    Attributes:
        kind: "simclr": random resized crop, flip, color jitter, grayscale, blur, solarization. "supervised": random
            resized crop, flip. "cifar": crop from the image with wider edges, flip. "none": central crop, for
            evaluation.
        area: of the random resized crop, smallest and largest fraction of the image.
        aspect: of the random resized crop, smallest and largest width / height.
        flip: probability of a mirror image.
        jitter: largest change of brightness, contrast, saturation (factor 1 +- this) and hue (circles).
        jitter_strength: multiplies ``jitter``.
        jitter_probability: of jittering at all.
        grayscale: probability.
        blur: probability.
        blur_sigma: smallest and largest, in pixels.
        blur_kernel: taps of the blur as a fraction of the side of a view.
        solarize: probability of inverting all values of at least 128 / 255.
        pad: pixels of added edge, "cifar" only.
        edge: what is added: "reflect" the image mirrored at its outermost pixels, "zeros" black.
        rand_augment: after crop and flip ("supervised" and "cifar"), timm's RandAugment in timm's words:
            ``rand-m9-mstd0.5-inc1`` is magnitude 9 with a deviation of 0.5, two operations an image, all stronger with
            the magnitude. It runs on the workers, on one image at a time. ``None`` for none.
        center: fraction of the shorter side that the central crop keeps, "none" only.
        mean: of the channels, subtracted.
        std: of the channels, divided by.
    """

    kind: Literal["simclr", "supervised", "cifar", "none"] = "simclr"
    area: tuple[Positive, Positive] = (0.08, 1.0)
    aspect: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    flip: Probabilities = 0.5
    jitter: tuple[NonNegative, NonNegative, NonNegative, NonNegative] = (0.8, 0.8, 0.8, 0.2)
    jitter_strength: Strengths = 1.0
    jitter_probability: Probabilities = 0.8
    grayscale: Probabilities = 0.2
    blur: Probabilities = 0.5
    blur_sigma: tuple[Positive, Positive] = (0.1, 2.0)
    blur_kernel: Probability = 0.1
    solarize: Probabilities = 0.0
    pad: NonNegativeInt = 4
    edge: Literal["reflect", "zeros"] = "reflect"
    rand_augment: str | None = None
    center: Probability = 0.875
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for name in ("area", "aspect", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be [smallest, largest] with 0 < smallest <= largest")
        if self.area[1] > 1:
            raise ValueError("area must be at most 1, the whole image")
        if self.jitter[3] * max(_listed(self.jitter_strength)) > 0.5:
            raise ValueError("jitter's hue times jitter_strength must be at most 0.5, half the color circle")
        if self.rand_augment is not None and not RAND_AUGMENT.fullmatch(self.rand_augment):
            raise ValueError(
                f"rand_augment={self.rand_augment}: must be of timm's form, such as rand-m9-mstd0.5-inc1: m magnitude, "
                "n operations an image, p probability, mstd deviation, mmax largest magnitude, inc 0 or 1, tweights"
            )
        if self.center == 0:
            raise ValueError("center must be above 0")

    def of(self, view: int) -> Views:
        """With the numbers of one view, counted from 0.

        Raises:
            UserError: a list that has none for it.
        """
        lists = {name: value for name in PER_VIEW if isinstance(value := getattr(self, name), tuple)}
        for name, values in lists.items():
            if view >= len(values):
                raise UserError(
                    f"views.{name}={list(values)}: must be a number, or one for each of an image's views"
                )
        return replace(self, **{name: values[view] for name, values in lists.items()})


def _listed(number: float | tuple[float, ...]) -> tuple[float, ...]:
    return number if isinstance(number, tuple) else (number,)
