"""Which files are images: by their suffix, or by how their bytes begin."""

from __future__ import annotations

import io
from posixpath import splitext

from PIL import Image

#: What a shard holds by convention; members with these extensions are not looked into.
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "ppm", "webp")

#: Pillow's names of the formats that are packed, and the suffixes of their files in lower case.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
}
SUFFIXES = frozenset(name for names in FORMATS.values() for name in names)

HEAD_BYTES = 1 << 18  # of a file, enough for Pillow to tell its format; metadata comes first and may be long


def suffix(name: str) -> str:
    """The suffix of a path in lower case; "" for none, and for a number (``image.0001``), which is no format."""
    found = splitext(name)[1].lower()
    return "" if found == "." or found[1:].isdigit() else found


def begins_like_an_image(head: bytes) -> bool:
    """Whether Pillow takes the first ``HEAD_BYTES`` of a file for an image of one of ``FORMATS``."""
    try:
        with Image.open(io.BytesIO(head), formats=list(FORMATS)):
            return True
    except Exception:  # Pillow's readers raise nearly everything
        return False
