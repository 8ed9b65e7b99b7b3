"""Images with a table of their labels beside them, after the conventions of Hugging Face and Kaggle."""

from __future__ import annotations

import csv
import io
import json
import posixpath
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from framework.data.packing.place import Place, kind
from framework.data.packing.readers.folders import split_name
from framework.data.packing.reading import Choices, Incomplete, Reader, Reading
from framework.data.packing.rows import UNLABELED, Row, labeled_files, less_known, sorted_classes, summary
from framework.data.shards.naming import SPLIT_WORDS, is_split
from framework.runtime.errors import UserError
from framework.runtime.text import printable

_SUFFIXES = {".csv": ",", ".tsv": "\t", ".jsonl": ""}
# labels.csv, metadata.jsonl, train.csv, train_labels.csv, trainLabels.csv, labels_train.csv
_WORDS = "(?:labels?|metadata|annotations?)"
_NAME = re.compile(rf"{_WORDS}?[-_ ]?(?P<split>{SPLIT_WORDS})?[-_ ]?{_WORDS}?", re.IGNORECASE)
_FILE_COLUMNS = {"file_name", "filename", "file", "file_path", "filepath", "path", "id"}
_FILE_COLUMNS |= {"image", "image_name", "image_id", "imageid", "image_path", "img", "img_name"}
_LABEL_COLUMNS = {
    "label",
    "labels",
    "class",
    "class_name",
    "classname",
    "category",
    "target",
    "breed",
    "species",
}
_SPLIT_COLUMNS = {"split", "set", "subset"}


@dataclass
class _Table:
    """A table of labels.

    Attributes:
        name: its path.
        columns: as they are called in it.
        lines: values by column.
    """

    name: str
    columns: list[str]
    lines: list[dict[str, str]]

    def known(self, names: set[str]) -> list[str]:
        """The columns that are called one of ``names``."""
        return [column for column in self.columns if re.sub(r"[\s-]", "_", column.strip().lower()) in names]


@dataclass
class _Files:
    """Finds the image that a line means: by path, by path without suffix, or by a name that only one image has."""

    place: Place
    paths: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for image in self.place.images:
            stem = posixpath.splitext(image)[0]
            base = image.rpartition("/")[2]
            for key in {image, stem, f"*/{base}", f"*/{posixpath.splitext(base)[0]}"}:
                self.paths.setdefault(key, []).append(image)

    def find(self, table: str, value: str, split: str) -> list[str]:
        """The images that ``value`` may mean in a table; those of its split if there are any."""
        value = value.strip().replace("\\", "/")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(table), value))
        found = self.paths.get(path) or self.paths.get(f"*/{posixpath.basename(path)}", [])
        same = [image for image in found if split and _folder_split(image) == split]
        return same or found


def _folder_split(image: str) -> str:
    """The outermost folder of an image that is named like a split."""
    return next((split_name(part) for part in image.split("/")[:-1] if is_split(part)), "")


def _find(place: Place, choices: Choices) -> Reading | None:
    tables = [name for name in place.files if _is_table(name)]
    if not tables or not place.images:
        return None
    files = _Files(place)
    rows: list[Row] = []
    missing: Counter[str] = Counter()
    problems: list[Incomplete] = []
    used: list[str] = []
    for name in tables:
        try:
            if found := _labels(place, name, files, choices, missing):
                rows += found
                used.append(name)
        except Incomplete as error:  # such as Kaggle's test.csv, without labels
            problems.append(error)
    if rows:
        return _reading(place, rows, used, missing)
    if problems:
        raise problems[0]
    return None


def _labels(place: Place, name: str, files: _Files, choices: Choices, missing: Counter[str]) -> list[Row]:
    """What a table says; nothing if it is no table of labels."""
    table = _parsed(place, name)
    if table is None or (file := _file_column(place, table, files, choices)) is None:
        return []
    label = _label_column(place, table, file, choices)
    return [] if label is None else list(_rows(place, table, file, label, files, missing))


def _reading(place: Place, rows: list[Row], tables: list[str], missing: Counter[str]) -> Reading:
    unique: dict[str, Row] = {}
    for row in rows:
        if unique.setdefault(row.file, row).label != row.label:
            raise UserError(
                f"{place.path}: {printable(row.file)} has two labels in {', '.join(tables)}, "
                f"{unique[row.file].label!r} and {row.label!r}"
            )
    classes = sorted_classes({row.label for row in unique.values()})
    images = [unique[name] for name in sorted(unique)]
    unpacked = place.unpacked([*tables, *place.images]) + missing
    if without := len(place.images) - len(images):
        unpacked[f"images without a row in {', '.join(tables)}"] = without
    return Reading(
        "table",
        f"{summary((row.split for row in images), classes)} by {', '.join(tables)}",
        lambda: labeled_files(place, images, classes),
        unpacked,
        less_known(place),
    )


def _is_table(name: str) -> bool:
    stem, end = posixpath.splitext(posixpath.basename(name))
    return name.count("/") <= 2 and end.lower() in _SUFFIXES and _NAME.fullmatch(stem) is not None


def _parsed(place: Place, name: str) -> _Table | None:
    """``None`` for a table without lines.

    Raises:
        UserError: it cannot be parsed.
    """
    try:
        text = place.read(name).decode("utf-8-sig")
        if kind(name) == ".jsonl":
            entries = [json.loads(line) for line in text.splitlines() if line.strip()]
            lines = [{key: _text(value) for key, value in entry.items()} for entry in entries]
        else:
            reader = csv.DictReader(
                io.StringIO(text, newline=""), delimiter=_SUFFIXES[kind(name)], strict=True
            )
            lines = [{key: value or "" for key, value in line.items() if key is not None} for line in reader]
    except (ValueError, AttributeError, csv.Error, RecursionError) as error:
        raise UserError(f"{place.path / name}: cannot be read as a table of labels ({error})") from error
    return _Table(name, list(dict.fromkeys(key for line in lines for key in line)), lines) if lines else None


def _text(value: object) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def _file_column(place: Place, table: _Table, files: _Files, choices: Choices) -> str | None:
    """The column that names the images; ``None`` if no column is called like one.

    Raises:
        UserError: none of them, or several, name images that are there.
    """
    if choices.file_column is not None:
        if choices.file_column in table.columns:
            return choices.file_column
        raise Incomplete(
            f"{place.path / table.name}: has no column {choices.file_column}, but {', '.join(table.columns)}"
        )
    columns = table.known(_FILE_COLUMNS)
    if not columns:
        return None
    split = _table_split(table)
    found = {
        column: [
            image for line in table.lines for image in files.find(table.name, line.get(column, ""), split)
        ]
        for column in columns
    }
    fitting = [column for column in columns if found[column]]
    if len(fitting) > 1 and any(found[column] != found[fitting[0]] for column in fitting):
        raise UserError(
            f"{place.path / table.name}: the columns {' and '.join(fitting)} name different images; "
            f"choose with --file-column"
        )
    if not fitting and table.known(_LABEL_COLUMNS):
        first = table.lines[0].get(columns[0], "")
        raise Incomplete(
            f"{place.path / table.name}: its column {columns[0]} names no image here, such as {first!r}"
        )
    return fitting[0] if fitting else None


def _label_column(place: Place, table: _Table, file: str, choices: Choices) -> str | None:
    """The column of labels; ``None`` if there is no column that could be one.

    Raises:
        UserError: there are several, or none has a known name.
    """
    if choices.label_column is not None:
        if choices.label_column not in table.columns:
            raise Incomplete(
                f"{place.path / table.name}: has no column {choices.label_column}, but {', '.join(table.columns)}"
            )
        return choices.label_column
    columns = [column for column in table.known(_LABEL_COLUMNS) if column != file]
    if len(columns) > 1:
        raise UserError(
            f"{place.path / table.name}: {' and '.join(columns)} could each be the label; choose with --label-column"
        )
    if columns:
        return columns[0]
    others = [column for column in table.columns if column not in (file, *table.known(_SPLIT_COLUMNS))]
    if not others:
        return None
    raise Incomplete(
        f"{place.path / table.name}: none of its columns {', '.join(others)} is called label or class; "
        f"choose with --label-column"
    )


def _rows(
    place: Place, table: _Table, file: str, label: str, files: _Files, missing: Counter[str]
) -> Iterator[Row]:
    """The lines whose image is there; the others are counted.

    Raises:
        UserError: a line without label, or with a name that several images have; a class none of whose images
            is there.
    """
    own = _table_split(table)
    split_column = next(iter(table.known(_SPLIT_COLUMNS)), None)
    wanted, found_labels = set[str](), set[str]()
    for number, line in enumerate(table.lines, 2 - (kind(table.name) == ".jsonl")):
        value, text = line.get(file, ""), line.get(label, "").strip()
        split = split_name(line.get(split_column, "").strip()) if split_column else own
        found = files.find(table.name, value, split)
        if len(found) > 1:
            raise UserError(
                f"{place.path / table.name}, line {number}: {value!r} may be {found[0]} or {found[1]}; "
                f"write the path below the table's folder"
            )
        if not text:
            raise UserError(f"{place.path / table.name}, line {number}: {value!r} has no {label}")
        wanted.add(text)
        if not found:
            missing[f"rows of {table.name} without an image"] += 1
            continue
        found_labels.add(text)
        yield Row(found[0], split if split_column else _folder_split(found[0]) or own, text)
    if lost := sorted(wanted - found_labels):
        raise UserError(
            f"{place.path / table.name}: no image of class {lost[0]!r} is there, so it would be missing"
        )


def _table_split(table: _Table) -> str:
    """The split that a table's name says: ``train.csv`` and ``train_labels.csv`` are of train."""
    match = _NAME.fullmatch(posixpath.splitext(posixpath.basename(table.name))[0])
    return split_name(match["split"]) if match and match["split"] else ""


READERS = (
    Reader(
        "table",
        "images and `labels.csv`, `metadata.csv`, `metadata.jsonl` or `train.csv`, with a column file_name (image, id, "
        "path ...) and a column label (class, category, target ...)",
        "the splits that folders, tables or a column split name, else one",
        _find,
        overrules=UNLABELED,
        generality=1,
    ),
)
