"""A table of (file, split, class) becomes a ``Reading``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

from framework.data.packing.images import FileImages, Images
from framework.data.packing.place import Place
from framework.data.packing.reading import Reading
from framework.runtime.errors import UserError
from framework.runtime.text import printable

#: Readers that see the same images without their labels.
UNLABELED = frozenset({"images", "split"})


class Row(NamedTuple):
    """One image.

    Attributes:
        file: its path below the place.
        split: "" where there are no splits.
        label: name of its class; "" where there are no labels.
    """

    file: str
    split: str
    label: str


def reading_of_rows(name: str, place: Place, rows: Iterable[Row], tables: Collection[str] = ()) -> Reading:
    """The reading of a place in which a table says the split and the class of every image.

    The classes are those of all splits, numbered in the order of their names (of their values if all are numbers).
    Rows whose file is not there, and files that no row names, are counted in ``Reading.unpacked``.

    Args:
        name: of the reader.
        place: where the images are.
        rows: of all images, in the order in which they are packed.
        tables: the files from which the rows come; they don't count as left out.

    Raises:
        UserError: a class or a split would be missing, since none of its files is there; a file has two different
            rows; some rows have a class (or split) and others have none; there are no rows.
    """
    listed: dict[str, Row] = {}
    for row in rows:
        if (other := listed.setdefault(row.file, row)) != row:
            raise UserError(
                f"{place.path}: {printable(row.file)} is listed twice, as {other[1:]} and {row[1:]}"
            )
    there = set(place.files)
    found = [row for row in listed.values() if row.file in there]
    if not found:
        raise UserError(f"{place.path}: none of the {len(listed)} files listed by {name} is there")
    _check_column(place, "split", {row.split for row in listed.values()}, {row.split for row in found})
    _check_column(place, "class", {row.label for row in listed.values()}, {row.label for row in found})
    classes = sorted_classes({row.label for row in found} - {""})
    unpacked = place.unpacked([*tables, *(row.file for row in found)])
    if missing := len(listed) - len(found):
        unpacked["rows without an image"] = missing
    return Reading(
        name,
        summary((row.split for row in found), classes),
        lambda: labeled_files(place, found, classes),
        unpacked,
        less_known(place) if classes else UNLABELED,
    )


def _check_column(place: Place, column: str, listed: set[str], found: set[str]) -> None:
    if "" in listed and len(listed) > 1:
        raise UserError(
            f"{place.path}: some images have a {column}, such as {max(listed)!r}, and some have none"
        )
    if lost := sorted(listed - found):
        raise UserError(f"{place.path}: no image of {column} {lost[0]!r} is there, so it would be missing")


def less_known(place: Place) -> frozenset[str]:
    """The readers that a table of labels replaces: folders say less, but for one folder for each of several classes."""
    folders = {name.rpartition("/")[0] for name in place.images}
    return UNLABELED | ({"class"} if len(folders) == 1 else set())


def sorted_classes(labels: set[str]) -> list[str]:
    """Names of classes in the order of their numbers: by value if all are whole numbers, else by name."""
    return sorted(labels, key=int if all(label.isdecimal() for label in labels) else str)


def summary(splits: Iterable[str], classes: Sequence[str]) -> str:
    """Such as "test 20 images, train 100 images, 10 classes", of the split of every image."""
    counts = [f"{split} {count} images".strip() for split, count in sorted(Counter(splits).items())]
    return ", ".join([*counts, counted_classes(classes)])


def counted_classes(classes: Sequence[str]) -> str:
    """Such as "10 classes"."""
    return "1 class" if len(classes) == 1 else f"{len(classes) or 'no'} classes"


def labeled_files(
    place: Place, rows: Iterable[tuple[str, str, str]], classes: Sequence[str]
) -> dict[str, Images]:
    """Images by split from rows (file, split, class or ""); ``classes`` is empty where there are no labels."""
    number = {name: i for i, name in enumerate(classes)}
    splits: dict[str, tuple[list[str], list[int]]] = {}
    for name, split, label in rows:
        names, labels = splits.setdefault(split, ([], []))
        names.append(name)
        if classes:
            labels.append(number[label])
    shown = [printable(name) for name in classes] or None
    return {
        split: FileImages(names, labels if classes else None, shown, _reader(place, names), str(place.path))
        for split, (names, labels) in splits.items()
    }


def _reader(place: Place, names: list[str]) -> Callable[[int], bytes]:
    return lambda i: place.read(names[i])
