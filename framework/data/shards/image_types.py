"""Which files are images: by their suffix, or by how their bytes begin."""

from __future__ import annotations

import io
from pathlib import PurePosixPath

from PIL import Image

#: What a shard holds by convention; members with these extensions are not looked into.
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "ppm", "webp")

#: File suffixes of the formats below, as Pillow registers them, in lower case.
SUFFIXES = frozenset(
    [
        ".apng",
        ".avif",
        ".avifs",
        ".bmp",
        ".dib",
        ".gif",
        ".j2c",
        ".j2k",
        ".jfif",
        ".jp2",
        ".jpc",
        ".jpe",
        ".jpeg",
        ".jpf",
        ".jpg",
        ".jpx",
        ".mpo",
        ".pbm",
        ".pfm",
        ".pgm",
        ".png",
        ".pnm",
        ".ppm",
        ".tif",
        ".tiff",
        ".webp",
    ]
)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000")

HEAD_BYTES = 1 << 18  # of a file, enough for Pillow to tell its format; metadata comes first and may be long


def suffix(name: str) -> str:
    """The suffix of a path in lower case; "" for none, and for a number (``image.0001``), which is no format."""
    found = PurePosixPath(name).suffix.lower()
    return "" if found[1:].isdigit() else found


def begins_like_an_image(head: bytes) -> bool:
    """Whether Pillow takes the first ``HEAD_BYTES`` of a file for an image of one of ``FORMATS``."""
    try:
        with Image.open(io.BytesIO(head), formats=FORMATS):
            return True
    except Exception:  # Pillow's readers raise nearly everything
        return False
