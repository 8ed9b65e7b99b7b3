"""A set of shards, read at random through an index of where every image lies."""

from __future__ import annotations

import filecmp
import functools
import hashlib
import logging
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from framework.data.places import check_folder
from framework.data.shards.scan import UNLABELED, Sample, scan_shard
from framework.data.shards.shard_contents import (
    ARRAYS,
    HEAD,
    Contents,
    Table,
    file_sha256,
    parse_classes,
    tabulate,
)
from framework.runtime.errors import UserError

logger = logging.getLogger(__name__)

_OPEN_FILES = 256  # per process; the usual limit is 1024 for everything


class OpenFile:
    """Closed when its last reader drops it, so that no cache pulls it from under another thread."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class Files(Protocol):
    """Where shards come from. Safe to use from several threads, after a fork, and to pickle.

    Attributes:
        location: folder or URL.
    """

    location: Path | str

    def open(self, name: str) -> OpenFile:
        """A shard to read; raises ``OSError`` or ``UserError``."""
        ...

    def prefetch(self, names: list[str]) -> None:
        """Say which shards will be opened next."""
        ...

    def close(self) -> None:
        """Let go of open shards; they open again when needed."""
        ...


class Folder:
    """Shards on a local disk."""

    def __init__(self, location: Path) -> None:
        self.location: Path | str = location
        self._opened = functools.lru_cache(_OPEN_FILES)(OpenFile)

    def open(self, name: str) -> OpenFile:
        return self._opened(Path(self.location) / name)

    def prefetch(self, names: list[str]) -> None:
        """Nothing to do: the disk is near."""

    def close(self) -> None:
        self._opened.cache_clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return Folder, (self.location,)


class ShardSet:
    """The samples of a folder of WebDataset shards, in the order of shard names and of members.

    Safe to use from several threads, and after a fork.

    Attributes:
        folder: where the shards lie, a path or a URL.
        shards: their sizes in bytes by name.
        table: the samples.
        classes: names of the classes, from ``classes.json`` in the folder or its parent, or ``None``.
    """

    def __init__(self, files: Files, contents: Contents) -> None:
        """Use ``open``, or ``remote.open_remote``."""
        self.files, self.contents = files, contents
        self.shards, self.table, self.classes = contents.shards, contents.table, contents.classes
        self._names = list(self.shards)

    @classmethod
    def open(cls, folder: Path) -> ShardSet:
        """Open a folder; a folder without index is indexed first, which reads the headers of all shards.

        Where the index cannot be written it is kept in memory only.

        Raises:
            UserError: no such folder, no ``*.tar`` in it, a shard missing, truncated, damaged, or not as
                indexed; a label that is no class; see also ``scan_shard``.
        """
        folder = Path(folder)
        shards = _list_shards(folder)
        classes = read_classes(folder)
        if not (folder / HEAD).exists():
            return cls(Folder(folder), _build(folder, shards, classes))
        try:
            head, arrays = (folder / HEAD).read_bytes(), (folder / ARRAYS).read_bytes()
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error
        contents = Contents.parse(folder, head, arrays)
        contents.check_unchanged(folder, shards)
        contents.check_classes(folder, classes)
        return cls(Folder(folder), contents)

    @property
    def folder(self) -> Path | str:
        return self.files.location

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64, -1 without labels."""
        return self.table.label

    @property
    def labeled(self) -> bool:
        """Whether the samples carry labels: all of them do, or none."""
        return bool(self.table.label[0] != UNLABELED)

    def __len__(self) -> int:
        return len(self.table.label)

    def read(self, i: int) -> bytes:
        """The encoded image of sample ``i``.

        Raises:
            UserError: the shard is gone or shorter than it was.
        """
        name, length = self._names[self.table.shard[i]], int(self.table.length[i])
        try:
            file = self.files.open(name)  # dropped, and perhaps closed, at the end of this call
            data = os.pread(file.descriptor, length, int(self.table.offset[i]))
        except OSError as error:
            raise UserError(f"{self.folder}/{name}: cannot be read: {error.strerror}") from error
        if len(data) != length:
            raise UserError(f"{self.folder}/{name}: became shorter while in use")
        return data

    def where(self, i: int) -> str:
        """Where sample ``i`` lies, for people: "shard.tar @ offset"."""
        return f"{self._names[self.table.shard[i]]} @ {self.table.offset[i]}"

    def take(self, samples: np.ndarray) -> ShardSet:
        """The set of these samples alone; ``samples`` are numbers in ascending order."""
        table = Table(*(column[samples] for column in self.table))
        return ShardSet(self.files, self.contents._replace(table=table))

    def subsample(self, count: int | None) -> ShardSet:
        """At most ``count`` of the samples, evenly spaced; ``None`` for all."""
        if count is None or count >= len(self):
            return self
        return self.take(np.linspace(0, len(self), count, endpoint=False).astype(np.int64))

    def prefetch(self, shards: tuple[int, ...]) -> None:
        """Bring the shards of these numbers near, while others are read."""
        self.files.prefetch([self._names[number] for number in shards])

    def close(self) -> None:
        """Close the shards; they open again when read."""
        self.files.close()


def read_classes(folder: Path) -> list[str] | None:
    """Class names from ``classes.json``, a list of strings, in ``folder`` or its parent.

    Raises:
        UserError: the file is something else.
    """
    for path in (folder / "classes.json", folder.absolute().parent / "classes.json"):
        if path.exists():
            try:
                return parse_classes(path, path.read_bytes())
            except OSError as error:
                raise UserError(f"{path}: must be a JSON list of class names ({error})") from error
    return None


def save_contents(folder: Path, sha256: dict[str, str] | None = None) -> None:
    """Index a folder of shards that was just written.

    Args:
        folder: of the shards.
        sha256: their checksums; computed unless given.

    Raises:
        UserError: as ``ShardSet.open``.
        OSError: the index cannot be written.
    """
    shards = _list_shards(folder)
    contents = _scan(folder, shards, read_classes(folder))
    sha256 = sha256 or {name: file_sha256(folder / name) for name in shards}
    contents._replace(sha256=sha256).save(folder)


def _list_shards(folder: Path) -> dict[str, int]:
    check_folder(folder)
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".tar") and name[0] != ".")
        if not names:
            raise UserError(f"{folder}: holds no shards (*.tar)")
        return {name: (folder / name).stat().st_size for name in names}
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _build(folder: Path, shards: dict[str, int], classes: list[str] | None) -> Contents:
    logger.info("indexing %d shards in %s", len(shards), folder)
    contents = _scan(folder, shards, classes)
    try:
        contents.save(folder)
    except OSError as error:
        logger.warning(
            "%s: the index cannot be saved (%s) and is built anew by every run", folder, error.strerror
        )
    return contents


def _scan(folder: Path, shards: dict[str, int], classes: list[str] | None) -> Contents:
    samples: dict[str, list[Sample]] = {}
    twins: dict[bytes, str] = {}
    for name in shards:
        samples[name] = scan_shard(folder / name)
        twin = twins.setdefault(_fingerprint(samples[name]), name)
        if twin != name and filecmp.cmp(folder / name, folder / twin, shallow=False):
            raise UserError(f"{folder / name}: is a copy of {twin}; remove one")
    return Contents(shards, tabulate(folder, samples, classes), classes, sha256={})


def _fingerprint(samples: list[Sample]) -> bytes:
    contents = [(sample.key, sample.length, sample.label) for sample in samples]
    return hashlib.sha256(repr(contents).encode()).digest()
