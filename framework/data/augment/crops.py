"""Geometry of views: which box of an image is seen, and its pixels.

``resized`` serves one image of any size on a worker; ``resized_batch`` serves images of equal size on any
device. Both are Pillow's antialiased bicubic filter on bytes; they differ by rounding, one gray level.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Box = tuple[int, int, int, int]  # left, upper, right, lower

ATTEMPTS = 10  # at a random crop, before the central one is taken


def random_box(
    width: int, height: int, area: tuple[float, float], aspect: tuple[float, float], uniforms: np.ndarray
) -> Box:
    """Random resized crop as torchvision draws it, from 40 numbers in [0, 1)."""
    for for_area, for_aspect, for_x, for_y in uniforms.reshape(ATTEMPTS, 4).tolist():
        pixels = width * height * (area[0] + for_area * (area[1] - area[0]))
        ratio = aspect[0] * (aspect[1] / aspect[0]) ** for_aspect
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = int(for_x * (width - w + 1)), int(for_y * (height - h + 1))
            return left, upper, left + w, upper + h
    w, h = min(width, round(height * aspect[1])), min(height, round(width / aspect[0]))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


def shifted_box(size: int, pad: int, uniforms: np.ndarray) -> Box:
    """A box of ``size`` moved by up to ``pad`` pixels each way, so that it may stand out over the edges."""
    left, upper = (int(number * (2 * pad + 1)) - pad for number in uniforms[:2].tolist())
    return left, upper, left + size, upper + size


def resized(image: Tensor, box: Box, size: tuple[int, int]) -> Tensor:
    """(3, H, W) uint8: the box of a uint8 image at another size (height, width)."""
    left, upper, right, lower = box
    cut = image[None, :, upper:lower, left:right]
    if cut.shape[2:] == size:
        return cut[0]
    return F.interpolate(cut, size, mode="bicubic", antialias=True)[0]


def central(image: Tensor, size: int, fraction: float) -> Tensor:
    """(3, size, size): the middle of the image, with ``fraction`` of its shorter side."""
    height, width = image.shape[1:]
    shorter = round(size / fraction)
    if width <= height:
        whole = (int(shorter * height / width), shorter)
    else:
        whole = (shorter, int(shorter * width / height))
    upper, left = (round((side - size) / 2) for side in whole)
    return resized(image, (0, 0, width, height), whole)[:, upper : upper + size, left : left + size]


def shifted_batch(images: Tensor, boxes: Tensor, edge: str) -> Tensor:
    """(N, 3, S, S): boxes that may stand out over images (N, 3, S, S).

    Args:
        images: of any type.
        boxes: (N, 4) int64 on the images' device, each of S pixels.
        edge: what lies outside: "reflect" the image mirrored at its outermost pixels, "zeros" black.
    """
    size = images.shape[-1]
    steps = torch.arange(size, device=images.device)
    x, y = boxes[:, :1] + steps, boxes[:, 1:2] + steps
    inside = ((x >= 0) & (x < size)).unsqueeze(1) & ((y >= 0) & (y < size)).unsqueeze(2)
    x, y = ((size - 1 - (size - 1 - at.abs()).abs()).clamp(0, size - 1) for at in (x, y))
    rows = torch.arange(len(images), device=images.device).view(-1, 1, 1)
    cut = images.permute(0, 2, 3, 1)[rows, y.unsqueeze(2), x.unsqueeze(1)].permute(0, 3, 1, 2)
    return cut if edge == "reflect" else cut * inside.unsqueeze(1)


def resized_batch(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """(N, 3, size, size) uint8: a box of each of N uint8 images (N, 3, H, W), as ``resized`` cuts it."""
    across = _weights(boxes[:, 0], boxes[:, 2], images.shape[3], size)
    down = _weights(boxes[:, 1], boxes[:, 3], images.shape[2], size)
    rows = (images.float() @ across.mT.unsqueeze(1)).round_().clamp_(0, 255)
    return (down.unsqueeze(1) @ rows).round_().clamp_(0, 255).to(torch.uint8)


def _weights(low: Tensor, high: Tensor, side: int, size: int) -> Tensor:
    """(N, size, side): how much each of ``side`` pixels adds to each of ``size``, seeing [low, high) only."""
    scale = ((high - low).float() / size).view(-1, 1, 1)
    widened = scale.clamp_min(1)
    pixels = torch.arange(side, device=low.device)
    centers = low.view(-1, 1, 1) + (torch.arange(size, device=low.device).view(-1, 1) + 0.5) * scale
    x = ((pixels + 0.5 - centers) / widened).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2  # bicubic with a = -0.5
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0))
    weights = weights * ((pixels >= low.view(-1, 1, 1)) & (pixels < high.view(-1, 1, 1)))
    return weights / weights.sum(-1, keepdim=True)
