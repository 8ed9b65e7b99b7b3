"""Views of an image: what a training step sees of it.

The work has two halves. CPU workers decode and crop to bytes; color, blur and normalization, ten times as
expensive there, run on the device for the whole batch. Every random number comes from ``draw_uniforms``, so a
view is a pure function of (seed, epoch, position, view), whichever process computes it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from framework.config.views import Views
from framework.data.augment import color, crops
from framework.data.augment.crops import Box
from framework.data.augment.rand_augment import rand_augmented

_VIEW_STREAM = 1  # second word of the Philox key; the order of an epoch uses 0
# Which columns of ``draw_uniforms`` decide what: fixed, so that no field of ``Views`` shifts another's.
_CROP = slice(0, 4 * crops.ATTEMPTS)
_FLIP, _JITTER, _GRAYSCALE, _BLUR, _SIGMA = range(40, 45)
_ORDER, _FACTORS, _SOLARIZE, _RAND_AUGMENT = slice(45, 49), slice(49, 53), 53, 54
UNIFORMS = 55  # random numbers for one view of one image
_BLOCKS = 14  # of Philox's counter for one position, each of 4 numbers
_IN_CACHE = 4  # images that a CPU finishes together: 224 x 224 floats of more leave its second-level cache


class AugmentParams(NamedTuple):
    """What the device's half does to each of N images; on the CPU.

    Attributes:
        flip: (N,) bool.
        order: (N, 4) int64, column k is the operation of the jitter that comes k-th; -1 for no jitter.
        factors: (N, 4) float32: brightness, contrast, saturation, hue.
        grayscale: (N,) bool.
        sigma: (N,) float32, of the blur in pixels; 0 for no blur.
        solarize: (N,) bool.
    """

    flip: Tensor
    order: Tensor
    factors: Tensor
    grayscale: Tensor
    sigma: Tensor
    solarize: Tensor


def draw_uniforms(seed: int, epoch: int, view: int, first: int, count: int) -> np.ndarray:
    """All random numbers for one view of the ``count`` positions from ``first`` on.

    Returns:
        (count, UNIFORMS) float64, uniform in [0, 1). A row depends on its position, not on ``first``, and is the
        same on every machine and version of numpy.
    """
    philox = np.random.Philox(key=[seed, _VIEW_STREAM], counter=[_BLOCKS * first, 0, epoch, view])
    bits = philox.random_raw(4 * _BLOCKS * count).reshape(count, -1)[:, :UNIFORMS]
    return (bits >> np.uint64(11)) * 2.0**-53


def crop_view(views: Views, image: Tensor, size: int, uniforms: np.ndarray) -> Tensor:
    """The worker's half: cut and resize a uint8 image (3, H, W) to (3, size, size).

    With ``rand_augment`` the flip, which comes before that, belongs to it, too.

    Args:
        views: how a view is made, with numbers in place of lists.
        image: decoded.
        size: side of the view in pixels.
        uniforms: (UNIFORMS,), the row of ``draw_uniforms`` for this view.
    """
    if views.kind == "none":
        return crops.central(image, size, views.center)
    view = _random_crop(views, image, size, uniforms)
    if views.rand_augment is None:
        return view
    if uniforms[_FLIP] < views.flip:
        view = view.flip(-1)
    return rand_augmented(view, views.rand_augment, views.mean, int(uniforms[_RAND_AUGMENT] * 2**53))


def _random_crop(views: Views, image: Tensor, size: int, uniforms: np.ndarray) -> Tensor:
    height, width = image.shape[1:]
    if views.kind != "cifar":
        return crops.resized(image, crop_box(views, height, width, size, uniforms), (size, size))
    whole = crops.resized(image, (0, 0, width, height), (size, size))
    box = torch.tensor([crop_box(views, size, size, size, uniforms)])
    return crops.shifted_batch(whole[None], box, views.edge)[0]


def crop_box(views: Views, height: int, width: int, size: int, uniforms: np.ndarray) -> Box:
    """The part of an image of that height and width that a random view shows; "cifar" shows ``size`` pixels."""
    if views.kind == "cifar":
        return crops.shifted_box(size, views.pad, uniforms[_CROP])
    return crops.random_box(width, height, views.area, views.aspect, uniforms[_CROP])


def augment_params(views: Views, uniforms: np.ndarray) -> AugmentParams:
    """The parameters of the device's half.

    Args:
        views: how views are made.
        uniforms: (V, N, UNIFORMS), the rows of all views of N images; or (N, UNIFORMS) of one view.

    Returns:
        Parameters of V*N crops, view-major.
    """
    by_view = uniforms if uniforms.ndim == 3 else uniforms[None]
    parts = [_view_params(views.of(view), rows) for view, rows in enumerate(by_view)]
    return AugmentParams(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def _view_params(views: Views, uniforms: np.ndarray) -> AugmentParams:
    n = len(uniforms)
    simclr = views.kind == "simclr"
    flipped = (uniforms[:, _FLIP] < views.flip) & (views.kind != "none") & (views.rand_augment is None)
    jittered = (uniforms[:, _JITTER] < views.jitter_probability) & simclr
    grayscale = (uniforms[:, _GRAYSCALE] < views.grayscale) & simclr
    blurred = (uniforms[:, _BLUR] < views.blur) & simclr
    solarized = (uniforms[:, _SOLARIZE] < views.solarize) & simclr
    order = np.where(jittered[:, None], uniforms[:, _ORDER].argsort(axis=1), -1)
    middle = np.array([1.0, 1.0, 1.0, 0.0])
    reach = np.array(views.jitter) * views.jitter_strength
    low, high = middle - reach, middle + reach
    low[:3] = np.maximum(low[:3], 0)
    factors = low + uniforms[:, _FACTORS] * (high - low)
    sigma = views.blur_sigma[0] + uniforms[:, _SIGMA] * (views.blur_sigma[1] - views.blur_sigma[0])
    return AugmentParams(
        flip=torch.from_numpy(flipped),
        order=torch.from_numpy(order).reshape(n, 4),
        factors=torch.from_numpy(factors.astype(np.float32)),
        grayscale=torch.from_numpy(grayscale),
        sigma=torch.from_numpy(np.where(blurred, sigma, 0).astype(np.float32)),
        solarize=torch.from_numpy(solarized),
    )


def finish_views(
    views: Views,
    pixels: Tensor,
    params: AugmentParams,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The device's half: flip, jitter, grayscale, blur, solarize and normalize.

    Args:
        views: how views are made.
        pixels: (N, 3, S, S) uint8 crops on the CPU.
        params: of the N crops.
        device: where to compute.
        dtype: of the result.

    Returns:
        (N, 3, S, S) of ``dtype`` on ``device``; computed in float32.
    """
    pixels = pixels.to(device, non_blocking=True)
    together = max(1, len(pixels)) if device.type == "cuda" else _IN_CACHE
    parts = zip(pixels.split(together), *(field.split(together) for field in params), strict=True)
    out = torch.empty(pixels.shape, dtype=dtype, device=device)
    for images, (part, *fields) in zip(out.split(together), parts, strict=True):
        images.copy_(_finish(views, part, AugmentParams(*fields)))
    return out


def _finish(views: Views, pixels: Tensor, params: AugmentParams) -> Tensor:
    device = pixels.device
    flipped = _rows(params.flip, device)
    images = pixels.index_copy(0, flipped, pixels[flipped].flip(-1)).float().div_(255)
    images = color.jitter(images, params.order, params.factors)
    grayed = _rows(params.grayscale, device)
    images[grayed] = color.gray(images[grayed]).expand(-1, 3, -1, -1)
    blurred = _rows(params.sigma > 0, device)
    kernel = blur_taps(views.blur_kernel, images.shape[-1])
    sigma = params.sigma.to(device, non_blocking=True)[blurred]
    images[blurred] = color.blur(images[blurred], sigma, kernel)
    inverted = _rows(params.solarize, device)
    images[inverted] = color.solarize(images[inverted])
    statistics = torch.tensor([views.mean, views.std]).to(device, non_blocking=True).view(2, 3, 1, 1)
    return images.sub_(statistics[0]).div_(statistics[1])


def blur_taps(fraction: float, size: int) -> int:
    """Odd number of taps of a blur kernel that spans ``fraction`` of ``size`` pixels, as SimCLR rounds it."""
    return 2 * (int(size * fraction) // 2) + 1


def _rows(mask: Tensor, device: torch.device) -> Tensor:
    """Indices of the true entries, found on the CPU: there their number is known without a device sync."""
    return mask.nonzero().squeeze(1).to(device, non_blocking=True)
