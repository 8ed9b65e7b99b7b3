"""The images of one split, read at random and from forked processes: what a reader gives and the packer takes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import numpy as np

from framework.data.shards.index import ShardSet
from framework.runtime.text import printable


class Item(NamedTuple):
    """One image.

    Attributes:
        where: for messages.
        image: encoded bytes, or (H, W, 3) uint8 pixels.
        label: its class or ``None``.
    """

    where: str
    image: bytes | np.ndarray
    label: int | None


class Images(Protocol):
    """The images of one split.

    Attributes:
        labels: (N,) class of each, or ``None``.
        classes: names of the classes, or ``None``.
        identity: changes when the images do.
    """

    labels: np.ndarray | None
    classes: list[str] | None
    identity: str

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Item: ...


class FileImages:
    """Images in named files.

    Args:
        names: path of each below the source, in order.
        labels: of each, or ``None``.
        classes: their names, or ``None``.
        read: the bytes of image i.
        identity: tells these images from others, besides the names and labels.
    """

    def __init__(
        self,
        names: list[str],
        labels: list[int] | None,
        classes: list[str] | None,
        read: Callable[[int], bytes],
        identity: str,
    ) -> None:
        self.names, self.classes, self._read = names, classes, read
        self.labels = None if labels is None else np.array(labels, np.int64)
        self.identity = _digest([identity, *names, *map(str, labels or [])])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Item:
        return Item(printable(self.names[i]), self._read(i), _label(self.labels, i))


class ArrayImages:
    """Images in one array (N, H, W, 3) uint8, with labels (N,) or ``None``."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray | None, classes: list[str] | None) -> None:
        self.pixels, self.labels, self.classes = pixels, labels, classes
        contents = hashlib.sha256(np.ascontiguousarray(pixels).data)
        self.identity = contents.hexdigest() + _digest([] if labels is None else map(str, labels.tolist()))

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> Item:
        return Item(f"image {i}", self.pixels[i], _label(self.labels, i))


class ShardImages:
    """Images of shards.

    Args:
        shards: where they lie.
        labels: (N,) in place of those in the shards; ``None`` for these, if there are any.
        classes: their names in place of those of the shards.
    """

    def __init__(
        self, shards: ShardSet, labels: np.ndarray | None = None, classes: list[str] | None = None
    ) -> None:
        self.shards, self.classes = shards, classes or shards.classes
        self.labels = labels if labels is not None else shards.labels if shards.labeled else None
        parts = [str(shards.folder), str(shards.shards), str(shards.contents.sha256)]
        self.identity = _digest(parts if labels is None else [*parts, *map(str, labels.tolist())])

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, i: int) -> Item:
        return Item(self.shards.where(i), self.shards.read(i), _label(self.labels, i))


def _label(labels: np.ndarray | None, i: int) -> int | None:
    return None if labels is None else int(labels[i])


def _digest(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()
