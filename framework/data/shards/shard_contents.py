"""What a folder of shards holds, and the two files that remember it.

``index.json`` has the shards, their sizes and checksums, class names and counts; ``index.npz`` has, per
sample, shard, offset, length and label. 1.28 million samples are 41 MB and load in a fraction of a second.
"""

from __future__ import annotations

import io
import json
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from framework.data.shards.scan import UNLABELED, Sample
from framework.runtime.errors import UserError
from framework.runtime.files import write_whole

HEAD, ARRAYS = "index.json", "index.npz"
_FORMAT = 2
_REBUILD = "delete index.json to have the folder indexed anew"


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
    """

    shards: dict[str, int]
    table: Table
    classes: list[str] | None
    sha256: dict[str, str]

    def save(self, folder: Path) -> None:
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
        }
        write_whole(folder / ARRAYS, arrays)
        write_whole(folder / HEAD, json.dumps(head, indent=1) + "\n")

    @classmethod
    def parse(cls, where: Path | str, head_bytes: bytes, arrays: bytes) -> Contents:
        """
        Args:
            where: the folder, for messages.
            head_bytes: of ``index.json``.
            arrays: of ``index.npz``.

        Raises:
            UserError: they are damaged, or of different indexings.
        """
        try:
            head = json.loads(head_bytes)
            if head["format"] != _FORMAT:
                raise ValueError(f"format {head['format']}, not {_FORMAT}")
            if zlib.crc32(arrays) != head["crc32"]:
                raise ValueError("index.npz is not the one that index.json was written with")
            with np.load(io.BytesIO(arrays), allow_pickle=False) as loaded:
                table = Table(*(loaded[name] for name in Table._fields))
            return cls(dict(head["shards"]), table, head["classes"], dict(head["sha256"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{where}/{HEAD}: damaged ({error}); {_REBUILD}") from error

    def check_unchanged(self, where: Path | str, found: dict[str, int]) -> None:
        """
        Args:
            where: the folder, for messages.
            found: sizes of the shards that are there now.

        Raises:
            UserError: a shard is missing, new, or of another size.
        """
        for name in sorted(self.shards.keys() | found.keys()):
            if name not in found:
                raise UserError(f"{where}/{name}: missing, though indexed; restore it, or {_REBUILD}")
            if name not in self.shards:
                raise UserError(f"{where}/{name}: not in the index; {_REBUILD}")
            if self.shards[name] != found[name]:
                raise UserError(
                    f"{where}/{name}: has {found[name]} bytes and had {self.shards[name]} when it was "
                    f"indexed; copy it again, or {_REBUILD}"
                )

    def check_classes(self, where: Path | str, named: list[str] | None) -> None:
        """
        Raises:
            UserError: ``classes.json`` now says something else.
        """
        if named is not None and named != self.classes:
            raise UserError(f"{where}: classes.json is not the one that was indexed; {_REBUILD}")


def tabulate(where: Path | str, samples: dict[str, list[Sample]], classes: list[str] | None) -> Table:
    """The table of all shards' samples.

    Raises:
        UserError: some samples have labels and some not; a label is no class.
    """
    rows = [(number, *sample[1:]) for number, name in enumerate(samples) for sample in samples[name]]
    columns = np.array(rows, np.int64).T
    table = Table(columns[0].astype(np.int32), *columns[1:].copy())
    names, unlabeled = list(samples), table.label == UNLABELED
    if unlabeled.any() and not unlabeled.all():
        shard = names[table.shard[unlabeled.argmax()]]
        raise UserError(f"{where}/{shard}: has samples without label; all samples must have one, or none")
    if classes is not None and table.label.max() >= len(classes):
        worst = table.label.argmax()
        raise UserError(
            f"{where}/{names[table.shard[worst]]}: label {table.label[worst]} is outside "
            f"the {len(classes)} classes of classes.json (0 to {len(classes) - 1})"
        )
    return table


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
