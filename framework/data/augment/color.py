"""Photometric operations on a batch, each image with its own parameters.

All take and return (N, 3, H, W) floats in [0, 1] and compute what ``torchvision.transforms.v2.functional``
computes for one image. None of them waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def jitter(images: Tensor, order: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue (operations 0 to 3), each image in its own order.

    Changes ``images`` in place.

    Args:
        images: (N, 3, H, W).
        order: (N, 4) int64 on the CPU; column k is the operation that comes k-th, or -1 for none.
        factors: (N, 4) float32 on the CPU; column k is the parameter of operation k.
    """
    operations = (brightness, contrast, saturation, hue)
    counts = [torch.bincount(column + 1, minlength=5).tolist() for column in order.T]
    # Sorted by operation on the CPU, where the sizes of the groups are known without waiting for the device.
    rows = order.argsort(dim=0, stable=True).to(images.device, non_blocking=True)
    factors = factors.to(images.device, images.dtype, non_blocking=True)
    for slot, count in enumerate(counts):
        for operation, group in enumerate(rows[:, slot].split(count)[1:]):
            if len(group):
                factor = factors[group, operation].view(-1, 1, 1, 1)
                images[group] = operations[operation](images[group], factor)
    return images


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Scale by ``factor`` (N, 1, 1, 1)."""
    return (images * factor).clamp_(0, 1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Away from the image's mean gray by ``factor`` (N, 1, 1, 1)."""
    return _blend(images, gray(images).mean((-2, -1), keepdim=True), factor)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Away from the pixel's gray by ``factor`` (N, 1, 1, 1)."""
    return _blend(images, gray(images), factor)


def hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by ``shift`` (N, 1, 1, 1) circles, each in [-1/2, 1/2].

    A channel of a color with hue h (in circles) is min + chroma * clamp(|6 frac(h + n) - 3| - 1, 0, 1), with
    n = 0, 2/3, 1/3 for red, green, blue.
    """
    red, green, blue = images.unbind(1)
    top = torch.maximum(torch.maximum(red, green), blue)
    least = torch.minimum(torch.minimum(red, green), blue)
    chroma = top - least
    others = torch.where(
        top == green, (blue - red).add_(chroma, alpha=2), (red - green).add_(chroma, alpha=4)
    )
    h = torch.where(top == red, green - blue, others).div_((6 * chroma).clamp_min_(1e-12))
    # 2 more circles keep ``frac`` from negative numbers, which it rounds towards 0.
    start = torch.tensor([2, 8 / 3, 7 / 3], dtype=images.dtype).to(images.device, non_blocking=True)
    turned = h.unsqueeze(1) + (shift + start.view(3, 1, 1))
    ramp = turned.frac_().mul_(6).sub_(3).abs_().sub_(1).clamp_(0, 1)
    return ramp.mul_(chroma.unsqueeze(1)).add_(least.unsqueeze(1))


def gray(images: Tensor) -> Tensor:
    """Luminance, (N, 1, H, W)."""
    red, green, blue = images.split(1, dim=1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def solarize(images: Tensor) -> Tensor:
    """Invert all values of at least 128 / 255, as Pillow does by default."""
    return torch.where(images < 128 / 255, images, 1 - images)


def blur(images: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """Gaussian blur with edges reflected.

    Args:
        images: (N, 3, H, W) with H, W > kernel / 2.
        sigma: (N,) in pixels, above 0.
        kernel: number of taps, odd.
    """
    n, channels, height, width = images.shape
    if n == 0:
        return images
    radius = kernel // 2
    taps = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    weight = torch.softmax(-0.5 * (taps / sigma.unsqueeze(1)) ** 2, dim=1).repeat_interleave(channels, dim=0)
    planes = F.pad(images, [radius] * 4, mode="reflect").view(1, n * channels, height + 2 * radius, -1)
    planes = F.conv2d(planes, weight.view(-1, 1, 1, kernel), groups=n * channels)
    planes = F.conv2d(planes, weight.view(-1, 1, kernel, 1), groups=n * channels)
    return planes.view(n, channels, height, width)


def _blend(images: Tensor, base: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(base.expand_as(images), images, factor).clamp_(0, 1)
