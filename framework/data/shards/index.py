"""A set of shards, read at random through an index of where every image lies."""

from __future__ import annotations

import filecmp
import hashlib
import logging
import os
from pathlib import Path

import numpy as np

from framework.data.shards.folder import Folder, ShardFiles, check_folder
from framework.data.shards.naming import check_one_series, is_compressed, matching
from framework.data.shards.scan import UNLABELED, Sample, ShardScan, scan_shard
from framework.data.shards.shard_contents import (
    INDEX,
    Contents,
    IndexFiles,
    Table,
    index_of,
    is_foreign,
    parse_classes,
    tabulate,
)
from framework.data.shards.unchanged import check_same
from framework.runtime.errors import UserError
from framework.runtime.files import sha256_of

logger = logging.getLogger(__name__)


class ShardSet:
    """The samples of a folder of WebDataset shards, in the order of shard names and of members.

    Safe to use from several threads, and after a fork.

    Attributes:
        folder: where the shards lie, a path or a URL.
        shards: their sizes in bytes by name.
        table: the samples.
        classes: names of the classes, from ``classes.json`` in the folder or its parent, or ``None``.
    """

    def __init__(self, files: ShardFiles, contents: Contents) -> None:
        """Use ``open``, or ``remote.open_remote``."""
        self.files, self.contents = files, contents
        self.shards, self.table, self.classes = contents.shards, contents.table, contents.classes
        self._names = list(self.shards)

    @classmethod
    def open(cls, folder: Path, pattern: str | None = None, save_index: bool = True) -> ShardSet:
        """Open a folder; a folder without index is indexed first, which reads the headers of all shards.

        Where the index cannot be written it is kept in memory only.

        Args:
            folder: of the shards.
            pattern: which of its shards, see ``naming.matching``; ``None`` for all, which must be one series.
            save_index: write the index of a folder that has none; else nothing is written, and all of every shard is
                compared with an index that is there.

        Raises:
            UserError: no such folder, no ``*.tar`` in it, a shard missing, truncated, damaged, or not as
                indexed; a label that is no class; see also ``scan_shard``.
        """
        folder = Path(folder)
        shards = _list_shards(folder, pattern)
        classes = read_classes(folder)
        contents = _indexed(folder, shards, classes, pattern, read_only=not save_index)
        return cls(Folder(folder), contents or _build(folder, shards, classes, pattern, save_index))

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

    @property
    def passed_over(self) -> dict[str, int]:
        """How many members of the shards are neither an image nor its label, by extension."""
        return self.contents.passed_over

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


def index_shards(folder: Path, sha256: dict[str, str] | None = None) -> Contents:
    """The contents of a folder of shards that was just written; nothing is saved yet.

    Args:
        folder: of the shards.
        sha256: their checksums; computed unless given.

    Raises:
        UserError: as ``ShardSet.open``.
    """
    shards = _list_shards(folder, None)
    contents = _scan(folder, shards, read_classes(folder))
    return contents._replace(sha256=sha256 or {name: sha256_of(folder / name) for name in shards})


def _list_shards(folder: Path, pattern: str | None) -> dict[str, int]:
    """Sizes of the shards of a folder by name, sorted."""
    check_folder(folder)
    try:
        there = sorted(name for name in os.listdir(folder) if name[0] != ".")
        names = [name for name in there if name.endswith(".tar")]
        compressed = [name for name in there if is_compressed(name)]
        if compressed and pattern is None:
            raise UserError(
                f"{folder}: holds {len(names)} .tar and {len(compressed)} compressed ones such as {compressed[0]}; "
                f"shards are read at random, so unpack these to .tar (gunzip, unxz, zstd -d), or move them away"
            )
        if not names:
            raise UserError(
                f"{folder}: holds no shards (*.tar); images become shards by tools/make_shards.py"
            )
        if pattern is None:
            check_one_series(folder, names)
        else:
            names = matching(folder, names, pattern)
        return {name: (folder / name).stat().st_size for name in names}
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _indexed(
    folder: Path, shards: dict[str, int], classes: list[str] | None, pattern: str | None, read_only: bool
) -> Contents | None:
    """The contents by an index that is there: that of the folder, if it has the shards asked for, or their own."""
    whole = _parsed(folder, INDEX)
    if whole is not None and (pattern is None or shards.keys() <= whole.shards.keys()):
        contents, files = whole.only(list(shards)) if pattern else whole, INDEX
    else:
        files = index_of(pattern)
        own = _parsed(folder, files)
        if own is None:
            return None
        contents = own
    contents.check_unchanged(folder, shards, files)
    contents.check_classes(folder, classes, files)
    check_same(folder, contents, files, read_only)
    return contents


def _parsed(folder: Path, files: IndexFiles) -> Contents | None:
    """An index of a folder; ``None`` if it has none, or another tool's."""
    if not (folder / files.head).exists():
        return None
    try:
        head = (folder / files.head).read_bytes()
        if is_foreign(head):
            return None
        return Contents.parse(folder, head, (folder / files.arrays).read_bytes(), files)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _build(
    folder: Path, shards: dict[str, int], classes: list[str] | None, pattern: str | None, save: bool
) -> Contents:
    logger.info("indexing %d shards in %s", len(shards), folder)
    contents = _scan(folder, shards, classes)
    if save:
        files = index_of(pattern) if pattern or (folder / INDEX.head).exists() else INDEX
        try:
            contents.save(folder, files)
        except UserError as error:
            logger.warning("%s; every run will index the folder anew", error)
    return contents


def _scan(folder: Path, shards: dict[str, int], classes: list[str] | None) -> Contents:
    scans: dict[str, ShardScan] = {}
    twins: dict[bytes, str] = {}
    for name in shards:
        scans[name] = scan_shard(folder / name)
        twin = twins.setdefault(_fingerprint(scans[name].samples), name)
        if twin != name and filecmp.cmp(folder / name, folder / twin, shallow=False):
            raise UserError(f"{folder / name}: is a copy of {twin}; remove one")
    return tabulate(folder, shards, scans, classes)


def _fingerprint(samples: list[Sample]) -> bytes:
    contents = [(sample.key, sample.length, sample.label) for sample in samples]
    return hashlib.sha256(repr(contents).encode()).digest()
