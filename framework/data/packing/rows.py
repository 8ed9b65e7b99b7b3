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
    """One image: a file, or part of one.

    Attributes:
        file: its path below the place.
        split: "" where there are no splits.
        label: name of its class; "" where there are no labels.
        start: its first byte in the file.
        size: its bytes from there on; ``None`` for all.
    """

    file: str
    split: str = ""
    label: str = ""
    start: int = 0
    size: int | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return self.file if self.size is None else f"{self.file}[{self.start}:{self.start + self.size}]"


def reading_of_rows(name: str, place: Place, rows: Iterable[Row], tables: Collection[str] = ()) -> Reading:
    """The reading of a place in which a table says the split and the class of every image.

    The classes are those of all splits, numbered in the order of their names (of their values if all are numbers).
    Parts of one file may have rows of their own. Rows whose file is not there, and files that no row names, are
    counted in ``Reading.unpacked``.

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
        if (other := listed.setdefault(row.name, row)) != row:
            raise UserError(
                f"{place.path}: {printable(row.name)} is listed twice, as {other[1:3]} and {row[1:3]}"
            )
    there = set(place.files)
    found = [row for row in listed.values() if row.file in there]
    if not found:
        raise UserError(f"{place.path}: none of the {len(listed)} images listed by {name} is there")
    check_column(place, "split", {row.split for row in listed.values()}, {row.split for row in found})
    check_column(place, "class", {row.label for row in listed.values()}, {row.label for row in found})
    classes = sorted_classes({row.label for row in found} - {""})
    unpacked = place.unpacked([*tables, *(row.file for row in found)])
    if missing := [row.name for row in listed.values() if row.file not in there]:
        rows_without = "row" if len(missing) == 1 else "rows"
        unpacked[f"{rows_without} without an image ({printable(missing[0])})"] = len(missing)
    return Reading(
        name,
        summary((row.split for row in found), classes),
        lambda: labeled_files(place, found, classes),
        unpacked,
        less_known(place) if classes else UNLABELED,
    )


def check_column(place: Place, column: str, listed: set[str], found: set[str]) -> None:
    """Refuse a column that some images have no value in, or a value none of whose images is there.

    Args:
        place: where the images are.
        column: "split" or "class".
        listed: its values.
        found: those of images that are there.

    Raises:
        UserError: it is so.
    """
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


def sorted_classes(labels: Collection[str]) -> list[str]:
    """Names of classes in the order of their numbers: by value if all are whole numbers (1 before 01), else by name."""
    if all(label.isdecimal() for label in labels):
        return sorted(labels, key=lambda label: (int(label), len(label), label))
    return sorted(labels)


def summary(splits: Iterable[str], classes: Sequence[str]) -> str:
    """Such as "test 20 images, train 100 images, 10 classes", of the split of every image."""
    counts = [f"{split} {count} images".strip() for split, count in sorted(Counter(splits).items())]
    return ", ".join([*counts, counted_classes(classes)])


def counted_classes(classes: Sequence[str]) -> str:
    """Such as "10 classes"."""
    return "1 class" if len(classes) == 1 else f"{len(classes) or 'no'} classes"


def labeled_files(place: Place, rows: Iterable[Row], classes: Sequence[str]) -> dict[str, Images]:
    """The images by split; ``classes`` is empty where there are no labels."""
    number = {name: i for i, name in enumerate(classes)}
    splits: dict[str, list[Row]] = {}
    for row in rows:
        splits.setdefault(row.split, []).append(row)
    shown = [printable(name) for name in classes] or None
    return {
        split: FileImages(
            [row.name for row in rows],
            [number[row.label] for row in rows] if classes else None,
            shown,
            _reader(place, rows),
            str(place.path),
        )
        for split, rows in splits.items()
    }


def _reader(place: Place, rows: list[Row]) -> Callable[[int], bytes]:
    return lambda i: place.read(rows[i].file, rows[i].start, rows[i].size)
