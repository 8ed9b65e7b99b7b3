"""A table of labels as a file: its separator and header, and the images that its lines mean."""

from __future__ import annotations

import csv
import io
import json
import posixpath
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from framework.data.packing.place import Place, kind
from framework.data.packing.reading import Incomplete
from framework.data.shards.image_types import SUFFIXES, suffix
from framework.data.shards.naming import are_same_split, is_split, split_name
from framework.runtime.errors import UserError

#: By suffix of a table, the separators that may be in it, the usual one first.
SEPARATORS = {".csv": ",;\t|", ".tsv": "\t,;|", ".txt": "\t,; ", ".jsonl": ""}
FILE_COLUMNS = {"file_name", "filename", "file", "file_path", "filepath", "path", "id"}
FILE_COLUMNS |= {"image", "image_name", "image_id", "imageid", "image_path", "img", "img_name"}


@dataclass
class Table:
    """A table of labels.

    Attributes:
        name: its path.
        columns: as they are called in it.
        lines: values by column.
        first: number of the first of these lines in the file, for messages.
    """

    name: str
    columns: list[str]
    lines: list[dict[str, str]]
    first: int

    def known(self, names: set[str]) -> list[str]:
        """The columns that are called one of ``names``."""
        return _known(self.columns, names)


@dataclass
class Files:
    """Finds the image that a line means: by path, by path without suffix, or by a name that only one image has."""

    place: Place
    paths: dict[str, list[str]] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for image in self.place.images:
            stem = posixpath.splitext(image)[0]
            folder, _, base = image.rpartition("/")
            self.folders.add(posixpath.basename(folder))
            for key in {image, stem, f"*/{base}", f"*/{posixpath.splitext(base)[0]}"}:
                self.paths.setdefault(key, []).append(image)

    @cached_property
    def say_classes(self) -> bool:
        """Whether the folders of the images, but for those of splits, may be classes."""
        folders = {posixpath.dirname(image) for image in self.place.images}
        return (
            len({tuple(part for part in folder.split("/") if not is_split(part)) for folder in folders}) > 1
        )

    def path(self, table: str, value: str) -> str:
        """The path that a value in a table says."""
        return posixpath.normpath(posixpath.join(posixpath.dirname(table), value.strip().replace("\\", "/")))

    def find(self, table: str, value: str, split: str) -> list[str]:
        """The images that ``value`` may mean in a table; those of its split if there are any."""
        path = self.path(table, value)
        found = self.paths.get(path) or self._by_name(path, value.strip().replace("\\", "/"))
        same = [image for image in found if split and are_same_split(folder_split(image), split)]
        return same or found

    def _by_name(self, path: str, value: str) -> list[str]:
        """Images of the same name in another folder: not if the value names a folder that is there."""
        found = self.paths.get(f"*/{posixpath.basename(path)}", [])
        named = posixpath.dirname(value)
        alike = [image for image in found if _end_alike(posixpath.dirname(image), named)]
        return alike if alike or posixpath.basename(named) in self.folders - {""} else found


def _end_alike(one: str, other: str) -> bool:
    """Whether one of two folders ends like the other."""
    return not one or not other or f"/{one}".endswith(f"/{other}") or f"/{other}".endswith(f"/{one}")


def folder_split(image: str) -> str:
    """The outermost folder of an image that is named like a split."""
    return next((split_name(part) for part in image.split("/")[:-1] if is_split(part)), "")


def parse_table(place: Place, name: str, files: Files, file_column: str | None) -> Table | None:
    """The table in a file; ``None`` for one without lines, or a text that is no table.

    A table without a header is one of two columns, of which one names an image in the first line. Such ones, and
    ``.txt``, are not looked for where folders already say the classes.

    Raises:
        Incomplete: it must have a header.
        UserError: it cannot be parsed.
    """
    if kind(name) == ".txt" and files.say_classes:
        return None
    try:
        text = place.read(name).decode("utf-8-sig")
        if kind(name) == ".jsonl":
            entries = [json.loads(line) for line in text.splitlines() if line.strip()]
            lines = [{key: _text(value) for key, value in entry.items()} for entry in entries]
            columns = list(dict.fromkeys(key for line in lines for key in line))
            return Table(name, columns, lines, 1) if lines else None
        return _separated(place, name, text, files, {*FILE_COLUMNS} if file_column is None else {file_column})
    except UserError:
        raise
    except (ValueError, AttributeError, csv.Error, RecursionError) as error:
        if kind(name) == ".txt":
            return None
        raise UserError(f"{place.path / name}: cannot be read as a table of labels ({error})") from error


def _text(value: object) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def _separated(place: Place, name: str, text: str, files: Files, wanted: set[str]) -> Table | None:
    separators, plain = SEPARATORS[kind(name)], not files.say_classes
    heads = {separator: _head(text, separator) for separator in separators}
    for separator, head in heads.items():
        if wanted.intersection(head) or _known(head, wanted):
            return _with_header(place, name, text, separator)
    for separator, head in heads.items() if plain else ():
        images = [i for i, cell in enumerate(head) if cell.strip() and files.find(name, cell, "")]
        if images and len(head) == 2:
            file = min(images, key=lambda i: (suffix(head[i].strip()) not in SUFFIXES, i))
            return _without_header(place, name, text, separator, file)
        if images and len(head) > 2:
            raise Incomplete(
                f"{place.path / name}: its first line must name the columns, such as file_name{separator}label"
            )
    return None if kind(name) == ".txt" else _with_header(place, name, text, separators[0])


def _head(text: str, separator: str) -> list[str]:
    """The cells of the first line; none where quotes don't fit."""
    try:
        return next(_rows(text, separator), [])
    except csv.Error:
        return []


def _rows(text: str, separator: str) -> Iterator[list[str]]:
    """The cells of all lines that have some; behind a blank, everything is one cell."""
    if separator == " ":
        return (line.split(maxsplit=1) for line in text.splitlines() if line.strip())
    return (row for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True) if row)


def _with_header(place: Place, name: str, text: str, separator: str) -> Table | None:
    columns, *rows = [*_rows(text, separator)] or [[]]
    return _table(place, name, columns, rows, 2)


def _without_header(place: Place, name: str, text: str, separator: str, file: int) -> Table | None:
    columns = ["file_name", "label"] if file == 0 else ["label", "file_name"]
    return _table(place, name, columns, [*_rows(text, separator)], 1)


def _table(place: Place, name: str, columns: list[str], rows: list[list[str]], first: int) -> Table | None:
    for number, row in enumerate(rows, first):
        if any(cell.strip() for cell in row[len(columns) :]):
            raise Incomplete(
                f"{place.path / name}, line {number}: has {len(row)} values, and there are {len(columns)} columns; "
                f"put quotes around values that hold a separator"
            )
    lines = [dict(zip(columns, row + [""] * (len(columns) - len(row)), strict=False)) for row in rows]
    return Table(name, list(dict.fromkeys(columns)), lines, first) if lines else None


def _known(columns: Collection[str], names: set[str]) -> list[str]:
    return [column for column in columns if re.sub(r"[\s-]", "_", column.strip().lower()) in names]
