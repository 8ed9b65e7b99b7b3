"""The table of contents of one WebDataset shard."""

from __future__ import annotations

import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from framework.data.shards.image_types import (
    HEAD_BYTES,
    IMAGE_EXTENSIONS,
    SUFFIXES,
    begins_like_an_image,
    suffix,
)
from framework.runtime import watchdog
from framework.runtime.errors import UserError
from framework.runtime.text import printable

UNLABELED = -1

# Key and extension; cut at the first dot of the base name.
_NAME = re.compile(r"((?:.*/|)[^.]+)\.([^/]*)", re.DOTALL)
_LABEL = re.compile(rb"\s*(\d{1,9})\s*")
PARSE_ERRORS = (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError)
_ZEROS = bytes(tarfile.BLOCKSIZE)

Members = dict[str, tarfile.TarInfo]  # of one key, by extension in lower case


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


class ShardScan(NamedTuple):
    """What a shard holds.

    Attributes:
        samples: in the order they are stored.
        passed_over: how many members are neither an image nor its label, by extension.
    """

    samples: list[Sample]
    passed_over: Counter[str]


def scan_shard(path: Path) -> ShardScan:
    """The samples of a tar file.

    Members are grouped by key as ``webdataset`` groups them, and the image of a group is its member with one of
    ``IMAGE_EXTENSIONS``; for these only headers and labels are read. In a group without one, members are images by
    their bytes, each with a key up to its last dot: ``a.v2.jpg`` and ``0.tif`` are images, too. Where samples have
    labels, images of this second kind without label are passed over (they may be masks).

    Raises:
        UserError: the file cannot be read, is not a tar file, is truncated or damaged; a sample has no image,
            two images or an unreadable label; a key comes twice; there is no image at all.
    """
    certain: list[tuple[int, Sample]] = []
    likely: list[tuple[int, Sample, str]] = []
    passed_over: Counter[str] = Counter()
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for place, (key, group) in enumerate(groups(path, tar, passed_over)):
                watchdog.sign()
                sample = _sample(path, file, key, group)
                used = {"cls"}
                if sample is not None:
                    certain.append((place, sample))
                    used |= set(IMAGE_EXTENSIONS)
                else:
                    for extension, sample in _likely_samples(path, file, key, group):
                        likely.append((place, sample, extension))
                        used |= {extension, f"{extension.rpartition('.')[0]}.cls"}
                passed_over.update(extension for extension in group if extension not in used)
            check_end(path, file, tar.offset)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except PARSE_ERRORS as error:
        raise UserError(f"{path}: not a whole tar file ({error}); copy or write it again") from error
    found = [sample for _, sample in certain] + [sample for _, sample, _ in likely]
    labeled = any(sample.label != UNLABELED for sample in found)
    for place, sample, extension in likely:
        if labeled and sample.label == UNLABELED:
            passed_over[extension] += 1
        else:
            certain.append((place, sample))
    if not certain:
        raise UserError(f"{path}: holds no image; members must end in {', '.join(IMAGE_EXTENSIONS)}")
    certain.sort(key=lambda found: found[0])
    return ShardScan([sample for _, sample in certain], passed_over)


def groups(path: Path, tar: tarfile.TarFile, passed_over: Counter[str]) -> Iterator[tuple[str, Members]]:
    """Neighboring members of equal key, as (key, {lower-case extension: member}).

    Members without a key, hidden ones and those without a suffix, are counted in ``passed_over``.

    Raises:
        UserError: a damaged header; a key or member comes twice; a member is a link.
    """
    seen: set[str] = set()
    key, group = None, Members()
    for member in members(path, tar):
        match = _NAME.fullmatch(member.name)
        if member.isdir():
            continue
        if match is None:
            passed_over["hidden" if "/." in f"/{member.name}" else "no suffix"] += 1
            continue
        name, extension = match[1], match[2].lower()
        if name != key:
            if key is not None:
                yield key, group
            if name in seen:
                raise UserError(
                    f"{path}: key {printable(name)!r} comes twice; a sample's members must lie together, once"
                )
            seen.add(name)
            key, group = name, {}
        if extension in group:
            raise UserError(f"{path}: member {printable(member.name)!r} comes twice")
        if not member.isreg() or member.issparse():
            raise UserError(
                f"{path}: member {printable(member.name)!r} is a link or sparse; it must be a plain file"
            )
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


def _sample(path: Path, file: BinaryIO, key: str, group: Members) -> Sample | None:
    """The sample of a group with an image by its extension."""
    images = [extension for extension in group if extension in IMAGE_EXTENSIONS]
    if len(images) > 1:
        raise UserError(
            f"{path}: key {printable(key)!r} has {len(images)} images ({', '.join(images)}); it must have one"
        )
    if not images:
        return None
    image = group[images[0]]
    return Sample(key, image.offset_data, image.size, _label(path, file, key, group.get("cls")))


def _likely_samples(path: Path, file: BinaryIO, key: str, group: Members) -> Iterator[tuple[str, Sample]]:
    """The samples of a group without an image by its extension: (extension, sample) of what is one by its bytes."""
    found = [extension for extension, member in group.items() if _is_image(file, extension, member)]
    if "cls" in group and len(found) != 1:
        problem = f"{len(found)} images ({', '.join(found)}); it must have one" if found else "no image"
        raise UserError(f"{path}: key {printable(key)!r} has {problem} ({', '.join(IMAGE_EXTENSIONS)})")
    for extension in found:
        stem = extension.rpartition(".")[0]
        label = group.get(f"{stem}.cls") if stem else None
        name = f"{key}.{stem}" if stem else key
        image = group[extension]
        value = _label(path, file, name, label or group.get("cls"))
        yield extension, Sample(name, image.offset_data, image.size, value)


def _is_image(file: BinaryIO, extension: str, member: tarfile.TarInfo) -> bool:
    if suffix(f"a.{extension}") not in SUFFIXES:
        return False
    file.seek(member.offset_data)
    return begins_like_an_image(file.read(min(member.size, HEAD_BYTES)))


def _label(path: Path, file: BinaryIO, key: str, member: tarfile.TarInfo | None) -> int:
    if member is None:
        return UNLABELED
    file.seek(member.offset_data)
    text = file.read(min(member.size, 32))
    match = _LABEL.fullmatch(text)
    if match is None:
        raise UserError(f"{path}: label of key {printable(key)!r} is {text!r}; it must be a class number")
    return int(match[1])


def check_end(path: Path, file: BinaryIO, offset: int) -> None:
    """A whole archive ends in zeros; ``tarfile`` stops without a word at anything that is not a header."""
    file.seek(offset)
    if file.read(tarfile.BLOCKSIZE) != _ZEROS:
        raise UserError(f"{path}: truncated or damaged at byte {offset}; copy or write it again")
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            raise UserError(f"{path}: has data behind its end at byte {offset}; it must be a single archive")
