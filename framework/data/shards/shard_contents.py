"""What a folder of shards holds, and the two files of the index that remember it.

``index.json`` has the shards, their sizes and checksums, class names and counts; ``index.npz`` has, per
sample, shard, offset, length and label. 1.28 million samples are 41 MB and load in a fraction of a second.
"""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from framework.data.shards.scan import UNLABELED, ShardScan
from framework.runtime.errors import UserError
from framework.runtime.files import write_whole

_FORMAT = 2
_OURS = {"format", "crc32"}  # keys that only this index has


class IndexFiles(NamedTuple):
    """The two files of an index.

    Attributes:
        head: such as ``index.json``.
        arrays: such as ``index.npz``.
    """

    head: str
    arrays: str

    @property
    def rebuild(self) -> str:
        """What to do when they don't fit."""
        return f"delete {self.head} to have the folder indexed anew"


INDEX = IndexFiles("index.json", "index.npz")


def index_of(pattern: str | None) -> IndexFiles:
    """Where the index lies that ``INDEX`` has no room for: of some shards only, or beside another tool's index.json."""
    name = f"stagewise-{hashlib.sha256((pattern or '').encode()).hexdigest()[:8]}"
    return IndexFiles(f"{name}.json", f"{name}.npz")


def is_foreign(head: bytes) -> bool:
    """Whether an ``index.json`` is whole and another tool's, such as that of ``wids`` or MosaicML."""
    try:
        return _OURS.isdisjoint(json.loads(head))
    except (ValueError, TypeError):
        return False


class Table(NamedTuple):
    """One row per sample.

    Attributes:
        shard: (N,) int32, number of the shard.
        offset: (N,) int64, first byte of the image in its shard.
        length: (N,) int64, bytes of the image.
        label: (N,) int64, its class, -1 without labels.
    """

    shard: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    label: np.ndarray


class Contents(NamedTuple):
    """All that is known of a folder of shards.

    Attributes:
        shards: their sizes in bytes by name, in order.
        table: the samples.
        classes: names of the classes, or ``None``.
        sha256: checksums by name, of those shards whose whole contents were seen.
        passed_over: how many members are neither an image nor its label, by extension.
    """

    shards: dict[str, int]
    table: Table
    classes: list[str] | None
    sha256: dict[str, str]
    passed_over: dict[str, int] = {}  # noqa: RUF012  # never changed

    def save(self, folder: Path, files: IndexFiles = INDEX) -> None:
        """Write both files; a reader sees the old ones, the new ones, or a checksum that does not fit.

        Raises:
            UserError: they can't be written.
        """
        buffer = io.BytesIO()
        np.savez(buffer, **self.table._asdict())
        arrays = buffer.getvalue()
        labeled = self.table.label[self.table.label != UNLABELED]
        head = {
            "format": _FORMAT,
            "crc32": zlib.crc32(arrays),
            "classes": self.classes,
            "class_counts": np.bincount(labeled, minlength=len(self.classes or [])).tolist(),
            "shards": self.shards,
            "sha256": self.sha256,
        } | ({"passed_over": self.passed_over} if self.passed_over else {})
        write_whole(folder / files.arrays, arrays)
        write_whole(folder / files.head, json.dumps(head, indent=1) + "\n")

    @classmethod
    def parse(
        cls, where: Path | str, head_bytes: bytes, arrays: bytes, files: IndexFiles = INDEX
    ) -> Contents:
        """
        Args:
            where: the folder, for messages.
            head_bytes: of ``index.json``.
            arrays: of ``index.npz``.
            files: their names, for messages.

        Raises:
            UserError: they are damaged, or of different indexings.
        """
        try:
            head = json.loads(head_bytes)
            if head["format"] != _FORMAT:
                raise ValueError(f"format {head['format']}, not {_FORMAT}")
            if zlib.crc32(arrays) != head["crc32"]:
                raise ValueError(f"{files.arrays} is not the one that was written with it")
            with np.load(io.BytesIO(arrays), allow_pickle=False) as loaded:
                table = Table(*(loaded[name] for name in Table._fields))
            passed_over = dict(head.get("passed_over", {}))
            return cls(dict(head["shards"]), table, head["classes"], dict(head["sha256"]), passed_over)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{where}/{files.head}: damaged ({error}); {files.rebuild}") from error

    def only(self, names: list[str]) -> Contents:
        """The contents of some of the shards; ``names`` are in order."""
        numbers = {name: number for number, name in enumerate(self.shards)}
        kept = np.array([numbers[name] for name in names])
        rows = np.isin(self.table.shard, kept)
        table = Table(*(column[rows] for column in self.table))
        table = table._replace(shard=np.searchsorted(kept, table.shard).astype(np.int32))
        sha256 = {name: self.sha256[name] for name in names if name in self.sha256}
        return self._replace(shards={name: self.shards[name] for name in names}, table=table, sha256=sha256)

    def check_unchanged(self, where: Path | str, found: dict[str, int], files: IndexFiles = INDEX) -> None:
        """
        Args:
            where: the folder, for messages.
            found: sizes of the shards that are there now.
            files: of the index, for messages.

        Raises:
            UserError: a shard is missing, new, or of another size.
        """
        for name in sorted(self.shards.keys() | found.keys()):
            if name not in found:
                raise UserError(f"{where}/{name}: missing, though indexed; restore it, or {files.rebuild}")
            if name not in self.shards:
                raise UserError(f"{where}/{name}: not in the index; {files.rebuild}")
            if self.shards[name] != found[name]:
                raise UserError(
                    f"{where}/{name}: has {found[name]} bytes and had {self.shards[name]} when it was "
                    f"indexed; copy it again, or {files.rebuild}"
                )

    def check_classes(self, where: Path | str, named: list[str] | None, files: IndexFiles = INDEX) -> None:
        """
        Raises:
            UserError: ``classes.json`` now says something else.
        """
        if named is not None and named != self.classes:
            raise UserError(f"{where}: classes.json is not the one that was indexed; {files.rebuild}")


def tabulate(
    where: Path | str, shards: dict[str, int], scans: dict[str, ShardScan], classes: list[str] | None
) -> Contents:
    """The contents of all shards, from what was found in each; without checksums.

    Raises:
        UserError: some samples have labels and some not; a label is no class.
    """
    rows = [(number, *sample[1:]) for number, name in enumerate(scans) for sample in scans[name].samples]
    columns = np.array(rows, np.int64).T
    table = Table(columns[0].astype(np.int32), *columns[1:].copy())
    names, unlabeled = list(scans), table.label == UNLABELED
    if unlabeled.any() and not unlabeled.all():
        shard = names[table.shard[unlabeled.argmax()]]
        raise UserError(f"{where}/{shard}: has samples without label; all samples must have one, or none")
    if classes is not None and table.label.max() >= len(classes):
        worst = table.label.argmax()
        raise UserError(
            f"{where}/{names[table.shard[worst]]}: label {table.label[worst]} is outside "
            f"the {len(classes)} classes of classes.json (0 to {len(classes) - 1})"
        )
    passed_over: Counter[str] = sum((scan.passed_over for scan in scans.values()), Counter())
    return Contents(shards, table, classes, sha256={}, passed_over=dict(passed_over))


def parse_classes(where: Path | str, data: bytes) -> list[str]:
    """Class names from the bytes of ``classes.json``, a list of strings.

    Raises:
        UserError: it is something else.
    """
    try:
        names = json.loads(data)
    except ValueError as error:
        raise UserError(f"{where}: must be a JSON list of class names ({error})") from error
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: must be a JSON list of class names")
    return names
