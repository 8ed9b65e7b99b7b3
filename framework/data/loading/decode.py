"""Encoded images to pixels."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

_JPEG = b"\xff\xd8\xff"


class BrokenImage(Exception):
    """Bytes that are no image, or none of 8 bits per channel."""


def decode(data: bytes) -> Tensor:
    """(3, H, W) uint8 RGB from the bytes of an image file; its name plays no part.

    JPEG is decoded at full size, by torchvision, to the pixels that Pillow gives in 1.3 times the time. What
    torchvision refuses (CMYK among it) and every other format is Pillow's.

    Raises:
        BrokenImage: whatever keeps it from being an image.
    """
    if data.startswith(_JPEG):
        try:
            return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
        except RuntimeError:
            pass  # Pillow decodes more, and says what is wrong
    pixels = np.array(_pillow(data))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _pillow(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
        if image.mode.startswith(("I", "F")):  # conversion to RGB would clip 16 bits to white
            raise ValueError(f"mode {image.mode} has more than 8 bits per channel")
        return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise BrokenImage("no known image format" if data else "empty") from error
    except Exception as error:  # Pillow's decoders raise nearly everything, SyntaxError included
        raise BrokenImage(f"{type(error).__name__}: {error}") from error
