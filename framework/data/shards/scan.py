"""The table of contents of one WebDataset shard."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from framework.runtime.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "ppm", "webp")
UNLABELED = -1

# Key and extension; cut at the first dot of the base name.
_NAME = re.compile(r"((?:.*/|)[^.]+)\.([^/]*)", re.DOTALL)
_LABEL = re.compile(rb"\s*(\d{1,9})\s*")
PARSE_ERRORS = (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError)
_ZEROS = bytes(tarfile.BLOCKSIZE)


class Sample(NamedTuple):
    """Where one sample lies in its shard.

    Attributes:
        key: name shared by the members of the sample.
        offset: of the image's first byte, from the start of the shard.
        length: of the image in bytes.
        label: its class, or ``UNLABELED``.
    """

    key: str
    offset: int
    length: int
    label: int


def scan_shard(path: Path) -> list[Sample]:
    """The samples of a tar file in the order they are stored.

    Reads headers and labels, not images. Members are grouped into samples as ``webdataset`` groups them;
    groups with neither an image nor a label are passed over.

    Raises:
        UserError: the file cannot be read, is not a tar file, is truncated or damaged; a sample has no image,
            two images or an unreadable label; a key comes twice; there is no image at all.
    """
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            found = [_sample(path, file, key, members) for key, members in _groups(path, tar)]
            check_end(path, file, tar.offset)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except PARSE_ERRORS as error:
        raise UserError(f"{path}: not a whole tar file ({error}); copy or write it again") from error
    samples = [sample for sample in found if sample is not None]
    if not samples:
        raise UserError(f"{path}: holds no image; members must end in {', '.join(IMAGE_EXTENSIONS)}")
    return samples


def _groups(path: Path, tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Neighboring members of equal key, as (key, {lower-case extension: member})."""
    seen: set[str] = set()
    key, group = None, dict[str, tarfile.TarInfo]()
    for member in members(path, tar):
        match = _NAME.fullmatch(member.name)
        if member.isdir() or match is None:
            continue
        name, extension = match[1], match[2].lower()
        if name != key:
            if key is not None:
                yield key, group
            if name in seen:
                raise UserError(
                    f"{path}: key {name!r} comes twice; a sample's members must lie together, once"
                )
            seen.add(name)
            key, group = name, {}
        if extension in group:
            raise UserError(f"{path}: member {member.name!r} comes twice")
        if not member.isreg() or member.issparse():
            raise UserError(f"{path}: member {member.name!r} is a link or sparse; it must be a plain file")
        group[extension] = member
    if key is not None:
        yield key, group


def members(path: Path, tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Members of an open archive, none of which is kept; raises ``UserError`` at a damaged header."""
    end = 0
    while (member := tar.next()) is not None:
        if member.size < 0 or member.offset < end:  # a crafted header would send tarfile round in circles
            raise UserError(f"{path}: damaged at byte {member.offset}; copy or write it again")
        end = member.offset_data + member.size
        yield member
        tar.members.clear()  # type: ignore[attr-defined]  # it keeps 1 kB for every member


def _sample(path: Path, file: BinaryIO, key: str, members: dict[str, tarfile.TarInfo]) -> Sample | None:
    images = [extension for extension in members if extension in IMAGE_EXTENSIONS]
    if len(images) > 1:
        raise UserError(
            f"{path}: key {key!r} has {len(images)} images ({', '.join(images)}); it must have one"
        )
    if not images:
        if "cls" in members:
            raise UserError(f"{path}: key {key!r} has no image ({', '.join(IMAGE_EXTENSIONS)})")
        return None
    label = UNLABELED
    if "cls" in members:
        file.seek(members["cls"].offset_data)
        text = file.read(min(members["cls"].size, 32))
        match = _LABEL.fullmatch(text)
        if match is None:
            raise UserError(f"{path}: label of key {key!r} is {text!r}; it must be a class number")
        label = int(match[1])
    return Sample(key, members[images[0]].offset_data, members[images[0]].size, label)


def check_end(path: Path, file: BinaryIO, offset: int) -> None:
    """A whole archive ends in zeros; ``tarfile`` stops without a word at anything that is not a header."""
    file.seek(offset)
    if file.read(tarfile.BLOCKSIZE) != _ZEROS:
        raise UserError(f"{path}: truncated or damaged at byte {offset}; copy or write it again")
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            raise UserError(f"{path}: has data behind its end at byte {offset}; it must be a single archive")
