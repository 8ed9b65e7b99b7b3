"""Small images in shards, as we write them and as other tools do."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from PIL import Image


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 3), number).save(buffer, "png")
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    """A shard as other tools make it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def samples(n: int) -> list[tuple[str, bytes, str, int]]:
    return [(f"{i:04d}", png(i % 256), "png", i % 3) for i in range(n)]
