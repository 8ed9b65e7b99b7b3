"""Views of an image: what a training step sees of it.

The work is cut in two. Workers on the CPU decode and crop to bytes; color, blur and normalization, an order
of magnitude dearer there, run on the device for the whole batch. All chance comes from ``chances``, so that a
view is a pure function of (seed, epoch, position, view), whoever computes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from framework.config.schema import NonNegative, NonNegativeInt, Positive, Probability
from framework.data.augment import color, crops
from framework.data.augment.crops import Box

_VIEW_STREAM = 1  # second word of the Philox key; the order of an epoch uses 0
# Which numbers of ``chances`` decide what: fixed, so that no field of ``Views`` shifts another's.
_CROP = slice(0, 4 * crops.ATTEMPTS)
_FLIP, _JITTER, _GRAYSCALE, _BLUR, _SIGMA = range(40, 45)
_ORDER, _FACTORS = slice(45, 49), slice(49, 53)
CHANCES = 53
_BLOCKS = 14  # of Philox's counter for one position, each of 4 numbers
_IN_CACHE = 4  # images that a CPU finishes together: 224 x 224 floats of more leave its second-level cache


class AugmentParams(NamedTuple):
    """The parameters of the device half, N images, on the CPU.

    Attributes:
        flip: (N,) bool.
        order: (N, 4) int64, the k-th of the four jitter operations; -1 for no jitter.
        factors: (N, 4) float32: brightness, contrast, saturation, hue.
        grayscale: (N,) bool.
        sigma: (N,) float32, of the blur in pixels; 0 for no blur.
    """

    flip: Tensor
    order: Tensor
    factors: Tensor
    grayscale: Tensor
    sigma: Tensor


@dataclass(frozen=True)
class Views:
    """How views are made; the defaults are SimCLR's for ImageNet.

    Attributes:
        kind: "simclr": random resized crop, flip, color jitter, grayscale, blur. "supervised": random
            resized crop, flip. "cifar": crop from the image with wider edges, flip. "none": central crop, for
            evaluation.
        area: of the random resized crop, smallest and largest share of the image.
        aspect: of the random resized crop, smallest and largest width / height.
        flip: probability of a mirror image.
        jitter: largest change of brightness, contrast, saturation (factor 1 +- this) and hue (circles).
        jitter_strength: multiplies ``jitter``.
        jitter_probability: of jittering at all.
        grayscale: probability.
        blur: probability.
        blur_sigma: smallest and largest, in pixels.
        blur_kernel: taps of the blur as share of the side of a view.
        pad: pixels of added edge, "cifar" only.
        edge: what is added: "reflect" the image mirrored at its outermost pixels, "zeros" black.
        center: share of the shorter side that the central crop keeps, "none" only.
        mean: of the channels, subtracted.
        std: of the channels, divided by.
    """

    kind: Literal["simclr", "supervised", "cifar", "none"] = "simclr"
    area: tuple[Positive, Positive] = (0.08, 1.0)
    aspect: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    flip: Probability = 0.5
    jitter: tuple[NonNegative, NonNegative, NonNegative, NonNegative] = (0.8, 0.8, 0.8, 0.2)
    jitter_strength: NonNegative = 1.0
    jitter_probability: Probability = 0.8
    grayscale: Probability = 0.2
    blur: Probability = 0.5
    blur_sigma: tuple[Positive, Positive] = (0.1, 2.0)
    blur_kernel: Probability = 0.1
    pad: NonNegativeInt = 4
    edge: Literal["reflect", "zeros"] = "reflect"
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
        if self.jitter[3] * self.jitter_strength > 0.5:
            raise ValueError("jitter's hue times jitter_strength must be at most 0.5, half the color circle")
        if self.center == 0:
            raise ValueError("center must be above 0")

    def crop(self, image: Tensor, size: int, chance: np.ndarray) -> Tensor:
        """The worker's half: cut and resize a uint8 image (3, H, W) to (3, size, size).

        ``chance`` is what ``chances`` gave for this view.
        """
        if self.kind == "none":
            return crops.central(image, size, self.center)
        height, width = image.shape[1:]
        if self.kind != "cifar":
            return crops.resized(image, self.box(height, width, size, chance), (size, size))
        whole = crops.resized(image, (0, 0, width, height), (size, size))
        box = torch.tensor([self.box(size, size, size, chance)])
        return crops.shifted_batch(whole[None], box, self.edge)[0]

    def box(self, height: int, width: int, size: int, chance: np.ndarray) -> Box:
        """What a random view sees of an image of that height and width; "cifar" sees ``size`` pixels."""
        if self.kind == "cifar":
            return crops.shifted_box(size, self.pad, chance[_CROP])
        return crops.random_box(width, height, self.area, self.aspect, chance[_CROP])

    def look(self, chance: np.ndarray) -> AugmentParams:
        """The parameters of the device half from ``chances`` (N, ...) of N views."""
        n = len(chance)
        simclr = self.kind == "simclr"
        flipped = (chance[:, _FLIP] < self.flip) & (self.kind != "none")
        jittered = (chance[:, _JITTER] < self.jitter_probability) & simclr
        grayscale = (chance[:, _GRAYSCALE] < self.grayscale) & simclr
        blurred = (chance[:, _BLUR] < self.blur) & simclr
        order = np.where(jittered[:, None], chance[:, _ORDER].argsort(axis=1), -1)
        middle = np.array([1.0, 1.0, 1.0, 0.0])
        reach = np.array(self.jitter) * self.jitter_strength
        low, high = middle - reach, middle + reach
        low[:3] = np.maximum(low[:3], 0)
        factors = low + chance[:, _FACTORS] * (high - low)
        sigma = self.blur_sigma[0] + chance[:, _SIGMA] * (self.blur_sigma[1] - self.blur_sigma[0])
        return AugmentParams(
            flip=torch.from_numpy(flipped),
            order=torch.from_numpy(order).reshape(n, 4),
            factors=torch.from_numpy(factors.astype(np.float32)),
            grayscale=torch.from_numpy(grayscale),
            sigma=torch.from_numpy(np.where(blurred, sigma, 0).astype(np.float32)),
        )

    def finish(
        self, pixels: Tensor, look: AugmentParams, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """The device's half: flip, jitter, grayscale, blur and normalize.

        Args:
            pixels: (N, 3, S, S) uint8 crops on the CPU.
            look: of the N crops.

        Returns:
            (N, 3, S, S) of ``dtype`` on ``device``; computed in float32.
        """
        pixels = pixels.to(device, non_blocking=True)
        together = max(1, len(pixels)) if device.type == "cuda" else _IN_CACHE
        parts = zip(pixels.split(together), *(field.split(together) for field in look), strict=True)
        out = torch.empty(pixels.shape, dtype=dtype, device=device)
        for images, (part, *fields) in zip(out.split(together), parts, strict=True):
            images.copy_(self._finish(part, AugmentParams(*fields)))
        return out

    def _finish(self, pixels: Tensor, look: AugmentParams) -> Tensor:
        device = pixels.device
        flipped = _rows(look.flip, device)
        images = pixels.index_copy(0, flipped, pixels[flipped].flip(-1)).float().div_(255)
        images = color.jitter(images, look.order, look.factors)
        grayed = _rows(look.grayscale, device)
        images[grayed] = color.gray(images[grayed]).expand(-1, 3, -1, -1)
        blurred = _rows(look.sigma > 0, device)
        kernel = blur_taps(self.blur_kernel, images.shape[-1])
        sigma = look.sigma.to(device, non_blocking=True)[blurred]
        images[blurred] = color.blur(images[blurred], sigma, kernel)
        statistics = torch.tensor([self.mean, self.std]).to(device, non_blocking=True).view(2, 3, 1, 1)
        return images.sub_(statistics[0]).div_(statistics[1])


def chances(seed: int, epoch: int, view: int, first: int, count: int) -> np.ndarray:
    """All the randomness of one view of ``count`` positions from ``first`` on.

    Returns:
        (count, CHANCES) float64 in [0, 1); a row depends on its position, not on where the call began, and is
        the same on every machine and version of numpy.
    """
    philox = np.random.Philox(key=[seed, _VIEW_STREAM], counter=[_BLOCKS * first, 0, epoch, view])
    bits = philox.random_raw(4 * _BLOCKS * count).reshape(count, -1)[:, :CHANCES]
    return (bits >> np.uint64(11)) * 2.0**-53


def blur_taps(share: float, size: int) -> int:
    """Odd number of taps of a blur kernel that spans ``share`` of ``size`` pixels, as SimCLR rounds it."""
    return 2 * (int(size * share) // 2) + 1


def _rows(mask: Tensor, device: torch.device) -> Tensor:
    """Indices of the true entries; found on the CPU, where the length is known without waiting for the
    device."""
    return mask.nonzero().squeeze(1).to(device, non_blocking=True)
