"""A folder of shards, opened at random through an index of where every image lies.

The index is two files beside the shards: ``index.json`` (shards, their sizes, class names) and ``index.npz``
(per sample: shard, offset, length, label). 1.28 million samples are 36 MB and load in a fraction of a second.
"""

from __future__ import annotations

import filecmp
import functools
import hashlib
import io
import json
import logging
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np

from framework.data.scan import UNLABELLED, Sample, scan_shard
from framework.errors import UserError

logger = logging.getLogger(__name__)

_FORMAT = 1
_REBUILD = "delete index.json to have the folder indexed anew"
_OPEN_FILES = 256  # per process; the usual limit is 1024 for everything


class Table(NamedTuple):
    """One row per sample.

    Attributes:
        shard: [N] int32, number of the shard.
        offset: [N] int64, first byte of the image in its shard.
        length: [N] int64, bytes of the image.
        label: [N] int64, its class, -1 without labels.
    """

    shard: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    label: np.ndarray


class ShardSet:
    """The samples of a folder of WebDataset shards, in the order of shard names and of members.

    Safe to use from several threads, and after a fork.

    Attributes:
        folder: where the shards lie.
        classes: names of the classes, from ``classes.json`` in the folder or its parent, or ``None``.
        labels: [N] int64, -1 without labels.
    """

    def __init__(self, folder: Path, shards: dict[str, int], table: Table, classes: list[str] | None) -> None:
        """Use ``open``; ``shards`` maps names to sizes in bytes."""
        self.folder, self.shards, self.table, self.classes = folder, shards, table, classes
        self._names = list(shards)
        self._opened = functools.lru_cache(_OPEN_FILES)(_OpenFile)

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
        if not (folder / "index.json").exists():
            return cls(folder, shards, _build(folder, shards, classes), classes)
        indexed, table, names = _load(folder)
        _check_unchanged(folder, indexed, shards)
        if classes is not None and classes != names:
            raise UserError(f"{folder}: classes.json is not the one that was indexed; {_REBUILD}")
        return cls(folder, shards, table, names)

    @property
    def labels(self) -> np.ndarray:
        return self.table.label

    @property
    def labelled(self) -> bool:
        """Whether the samples carry labels: all of them do, or none."""
        return bool(self.table.label[0] != UNLABELLED)

    def __len__(self) -> int:
        return len(self.table.label)

    def read(self, i: int) -> bytes:
        """The encoded image of sample ``i``.

        Raises:
            UserError: the shard is gone or shorter than it was.
        """
        name, length = self._names[self.table.shard[i]], int(self.table.length[i])
        try:
            data = os.pread(self._opened(self.folder / name).descriptor, length, int(self.table.offset[i]))
        except OSError as error:
            raise UserError(f"{self.folder / name}: cannot be read: {error.strerror}") from error
        if len(data) != length:
            raise UserError(f"{self.folder / name}: became shorter while in use")
        return data

    def where(self, i: int) -> str:
        """Where sample ``i`` lies, for people: "shard.tar @ offset"."""
        return f"{self._names[self.table.shard[i]]} @ {self.table.offset[i]}"

    def close(self) -> None:
        """Close the shards; they open again when read."""
        self._opened.cache_clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardSet, (self.folder, self.shards, self.table, self.classes)


class _OpenFile:
    """Closed when its last reader drops it, so that the cache never pulls it from under another thread."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def read_classes(folder: Path) -> list[str] | None:
    """Class names from ``classes.json``, a list of strings, in ``folder`` or its parent.

    Raises:
        UserError: the file is something else.
    """
    for path in (folder / "classes.json", folder.absolute().parent / "classes.json"):
        if path.exists():
            try:
                names = json.loads(path.read_bytes())
            except (ValueError, OSError) as error:
                raise UserError(f"{path}: must be a JSON list of class names ({error})") from error
            if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
                raise UserError(f"{path}: must be a JSON list of class names")
            return names
    return None


def _list_shards(folder: Path) -> dict[str, int]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; it must hold the shards (*.tar)")
    names = sorted(path.name for path in folder.glob("*.tar") if not path.name.startswith("."))
    if not names:
        raise UserError(f"{folder}: holds no shards (*.tar)")
    try:
        return {name: (folder / name).stat().st_size for name in names}
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _build(folder: Path, shards: dict[str, int], classes: list[str] | None) -> Table:
    logger.info("indexing %d shards in %s", len(shards), folder)
    rows: list[tuple[int, int, int, int]] = []
    contents: dict[bytes, str] = {}
    for number, name in enumerate(shards):
        samples = scan_shard(folder / name)
        twin = contents.setdefault(_fingerprint(samples), name)
        if twin != name and filecmp.cmp(folder / name, folder / twin, shallow=False):
            raise UserError(f"{folder / name}: is a copy of {twin}; remove one")
        rows += [(number, *sample[1:]) for sample in samples]
    columns = np.array(rows, np.int64).T
    table = Table(columns[0].astype(np.int32), *columns[1:].copy())
    _check_labels(folder, list(shards), table, classes)
    try:
        _save(folder, shards, table, classes)
    except OSError as error:
        logger.warning(
            "%s: the index cannot be saved (%s) and is built anew by every run", folder, error.strerror
        )
    return table


def _fingerprint(samples: list[Sample]) -> bytes:
    contents = [(sample.key, sample.length, sample.label) for sample in samples]
    return hashlib.sha256(repr(contents).encode()).digest()


def _check_labels(folder: Path, names: list[str], table: Table, classes: list[str] | None) -> None:
    unlabelled = table.label == UNLABELLED
    if unlabelled.any() and not unlabelled.all():
        shard = names[table.shard[unlabelled.argmax()]]
        raise UserError(f"{folder / shard}: has samples without label; all samples must have one, or none")
    if classes is not None and table.label.max() >= len(classes):
        worst = table.label.argmax()
        raise UserError(
            f"{folder / names[table.shard[worst]]}: label {table.label[worst]} is outside "
            f"the {len(classes)} classes of classes.json (0 to {len(classes) - 1})"
        )


def _check_unchanged(folder: Path, indexed: dict[str, int], shards: dict[str, int]) -> None:
    for name in sorted(indexed.keys() | shards.keys()):
        if name not in shards:
            raise UserError(f"{folder / name}: missing, though indexed; restore it, or {_REBUILD}")
        if name not in indexed:
            raise UserError(f"{folder / name}: not in the index; {_REBUILD}")
        if indexed[name] != shards[name]:
            raise UserError(
                f"{folder / name}: has {shards[name]} bytes and had {indexed[name]} when it was indexed; "
                f"copy it again, or {_REBUILD}"
            )


def _save(folder: Path, shards: dict[str, int], table: Table, classes: list[str] | None) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **table._asdict())
    arrays = buffer.getvalue()
    head = {"format": _FORMAT, "crc32": zlib.crc32(arrays), "classes": classes, "shards": shards}
    _replace(folder / "index.npz", arrays)
    _replace(folder / "index.json", (json.dumps(head, indent=1) + "\n").encode())


def _replace(path: Path, data: bytes) -> None:
    """Write in one go: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _load(folder: Path) -> tuple[dict[str, int], Table, list[str] | None]:
    try:
        head = json.loads((folder / "index.json").read_bytes())
        if head["format"] != _FORMAT:
            raise ValueError(f"format {head['format']}, not {_FORMAT}")
        arrays = (folder / "index.npz").read_bytes()
        if zlib.crc32(arrays) != head["crc32"]:
            raise ValueError("index.npz is not the one that index.json was written with")
        with np.load(io.BytesIO(arrays), allow_pickle=False) as loaded:
            table = Table(*(loaded[name] for name in Table._fields))
        return dict(head["shards"]), table, head["classes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'index.json'}: damaged ({error}); {_REBUILD}") from error
