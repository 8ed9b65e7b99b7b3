"""Images with a table of their labels beside them, after the conventions of Hugging Face and Kaggle."""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Iterator

from framework.data.packing.label_tables import (
    FILE_COLUMNS,
    SEPARATORS,
    Files,
    Table,
    folder_split,
    parse_table,
)
from framework.data.packing.place import Place, kind
from framework.data.packing.reading import Choices, Incomplete, Reader, Reading
from framework.data.packing.rows import (
    UNLABELED,
    Row,
    check_column,
    labeled_files,
    less_known,
    sorted_classes,
    summary,
)
from framework.data.shards.naming import SPLIT_WORDS, are_same_split, is_split, split_name
from framework.runtime.errors import UserError
from framework.runtime.text import printable

# labels.csv, metadata.jsonl, train.csv, train_labels.csv, trainLabels.csv, labels_train.csv
_WORDS = "(?:labels?|metadata|annotations?)"
_NAME = re.compile(rf"{_WORDS}?[-_ ]?(?P<split>{SPLIT_WORDS})?[-_ ]?{_WORDS}?", re.IGNORECASE)
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


class _NoImage(Incomplete):
    """A table of labels, none of whose images is there."""


def _find(place: Place, choices: Choices) -> Reading | None:
    tables = [name for name in place.files if _is_table(name)]
    if not tables or not place.images:
        return None
    files = Files(place)
    rows: list[Row] = []
    missing: Counter[str] = Counter()
    problems: list[Incomplete] = []
    lost: list[Incomplete] = []
    used: list[str] = []
    for name in tables:
        try:
            if found := _labels(place, name, files, choices, missing):
                rows += found
                used.append(name)
        except _NoImage as error:
            (lost if _table_split(name) else problems).append(error)
        except Incomplete as error:  # such as Kaggle's test.csv, without labels
            problems.append(error)
    if rows and lost:
        raise UserError(f"{lost[0]}, so the split would be missing; --skip the table to leave it out")
    if rows:
        return _reading(place, rows, used, missing)
    if problems or lost:
        raise [*problems, *lost][0]
    return None


def _labels(place: Place, name: str, files: Files, choices: Choices, missing: Counter[str]) -> list[Row]:
    """What a table says; nothing if it is no table of labels."""
    table = parse_table(place, name, files, choices.file_column)
    if table is None:
        _check_text(place, name, files)
        return []
    if (file := _file_column(place, table, files, choices)) is None:
        return []
    label = _label_column(place, table, file, choices)
    return [] if label is None else list(_rows(place, table, file, label, files, missing))


def _check_text(place: Place, name: str, files: Files) -> None:
    """Refuse a text that is called like labels and that nobody can read, where nothing else says the classes."""
    is_called_so = re.search("label|annotation", posixpath.basename(name), re.IGNORECASE)
    if kind(name) == ".txt" and is_called_so and not files.say_classes:
        raise Incomplete(
            f"{place.path / name}: is no table of labels; lines must read FILE LABEL, or its first line name "
            f"the columns, such as file_name,label"
        )


def _reading(place: Place, rows: list[Row], tables: list[str], missing: Counter[str]) -> Reading:
    unique: dict[str, Row] = {}
    for row in rows:
        other = unique.setdefault(row.file, row)
        if other.label != row.label:
            raise UserError(
                f"{place.path}: {printable(row.file)} has two labels in {', '.join(tables)}, "
                f"{other.label!r} and {row.label!r}"
            )
        if other.split == "":  # labels.csv beside train.csv
            unique[row.file] = row
        elif row.split not in ("", other.split):
            raise UserError(
                f"{place.path}: {printable(row.file)} is in two splits in {', '.join(tables)}, "
                f"{other.split!r} and {row.split!r}"
            )
    splits = {row.split for row in unique.values()}
    check_column(place, "split", splits, splits)
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
    return name.count("/") <= 2 and end.lower() in SEPARATORS and _NAME.fullmatch(stem) is not None


def _file_column(place: Place, table: Table, files: Files, choices: Choices) -> str | None:
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
    columns = table.known(FILE_COLUMNS)
    if not columns:
        if files.say_classes:
            return None
        raise Incomplete(
            f"{place.path / table.name}: none of its columns {', '.join(map(printable, table.columns[:5]))} is called "
            f"file_name, image or id; its first line must name them, or choose with --file-column"
        )
    split = _table_split(table.name)
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
        raise _NoImage(
            f"{place.path / table.name}: its column {columns[0]} names no image here, such as {first!r}"
        )
    return fitting[0] if fitting else None


def _label_column(place: Place, table: Table, file: str, choices: Choices) -> str | None:
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
    place: Place, table: Table, file: str, label: str, files: Files, missing: Counter[str]
) -> Iterator[Row]:
    """The lines whose image is there; the others are counted.

    Raises:
        UserError: a line without label, or with a name that several images have; a class none of whose images
            is there.
    """
    own = _table_split(table.name)
    split_column = next(iter(table.known(_SPLIT_COLUMNS)), None)
    wanted, there = set[tuple[str, str]](), set[tuple[str, str]]()
    for number, line in enumerate(table.lines, table.first):
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
        wanted |= {("class", text), ("split", split)}
        _check_split(place, table, number, files, value, split, found, split_column is not None)
        if not found:
            missing[f"rows of {table.name} without an image"] += 1
            continue
        there |= {("class", text), ("split", split)}
        yield Row(found[0], split if split_column else folder_split(found[0]) or own, text)
    if lost := sorted(wanted - there):
        raise UserError(
            f"{place.path / table.name}: no image of {lost[0][0]} {lost[0][1]!r} is there, so it would be missing"
        )


def _check_split(
    place: Place,
    table: Table,
    number: int,
    files: Files,
    value: str,
    split: str,
    found: list[str],
    chosen: bool,
) -> None:
    """Refuse an image in the folder of another split: it may only have the name of one that is missing.

    A column split, ``chosen``, may say so of a path.
    """
    other = folder_split(found[0]) if found else ""
    if not other:
        return
    path = files.path(table.name, value)
    wanted = split or folder_split(path)
    if not is_split(wanted) or are_same_split(wanted, other):
        return
    if not (chosen and path in files.paths):
        raise UserError(
            f"{place.path / table.name}, line {number}: {value!r} is without an image in {wanted}, and {found[0]} "
            f"is of {other}; remove the line, or say its split in a column split and its path"
        )


def _table_split(table: str) -> str:
    """The split that a table's name says: ``train.csv`` and ``train_labels.csv`` are of train."""
    match = _NAME.fullmatch(posixpath.splitext(posixpath.basename(table))[0])
    return split_name(match["split"]) if match and match["split"] else ""


READERS = (
    Reader(
        "table",
        "images and `labels.csv` (`.tsv`, `.txt`), `metadata.csv`, `metadata.jsonl` or `train.csv`, with a column "
        "file_name (image, id, path ...) and a column label (class, category, target ...), or lines `1.jpg cat`",
        "the splits that folders, tables or a column split name, else one",
        _find,
        overrules=UNLABELED,
        generality=1,
    ),
)
