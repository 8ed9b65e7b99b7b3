"""Images whose folders say their split and class."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from framework.data.packing.missing import TEXTS, check_folders
from framework.data.packing.place import Place, kind
from framework.data.packing.reading import Choices, Reader, Reading
from framework.data.packing.rows import Row, labeled_files, summary
from framework.data.shards.naming import is_split, split_name
from framework.runtime.errors import UserError
from framework.runtime.text import printable

# Words in names of folders that only hold images, such as my_images or png256; alone, such a folder may be no class.
_CONTAINER_WORDS = {
    *("images", "image", "imgs", "img", "jpg", "jpgs", "jpeg", "jpegs", "png", "pngs", "jpegimages"),
    *("pictures", "pics", "photos", "frames", "files", "data", "dataset"),
}


class _Layout(NamedTuple):
    """What the folders of images say.

    Attributes:
        around: folder around all of it, with a slash, or "".
        names: the readers that fit.
    """

    around: str
    names: tuple[str, ...]


def _find(name: str, place: Place, choices: Choices) -> Reading | None:
    if not place.images:
        return None
    asked = choices.reader == name
    layout = _asked(name, place) if asked else _guess(place)
    return _build(name, layout.around, place) if name in layout.names else None


def _guess(place: Place) -> _Layout:
    """Which readings the folders allow.

    Raises:
        UserError: they are not alike, or of several data sets.
    """
    images = place.images
    common = _common_folders(images)
    for depth in range(len(common) + 1):
        around = "".join(f"{folder}/" for folder in common[:depth])
        if all("/" in name[len(around) :] and is_split(_top(name, around)) for name in images):
            return _guess_in_splits(place, around)
    parts = _parts(images, "")
    _check_sets(place, parts)
    depth = _check_depth(place, parts)
    if depth == 1:
        return _Layout("", ("images",))
    tops = {part[0] for part in parts}
    if depth == 2:
        splits = [top for top in tops if is_split(top)]
        unsure = len(splits) > 1 and any(split_name(top).startswith("train") for top in splits)
        if unsure:
            return _Layout("", ("class", "split"))
        return _Layout("", _classes_or_none(place, tops))
    if len(tops) == 1:
        return _Layout(f"{common[0]}/", _classes_or_none(place, {part[1] for part in parts}))
    return _Layout("", ("split/class", "class"))


def _guess_in_splits(place: Place, around: str) -> _Layout:
    parts = _parts(place.images, around)
    if _check_depth(place, parts) == 2:
        return _Layout(around, ("split",))
    classes = {part[1] for part in parts}
    if all(part[1] == part[0] for part in parts):
        return _Layout(around, ("split",))  # test/test/1.jpg
    if _is_container(classes):
        return _Layout(around, ("split", "split/class"))
    return _Layout(around, ("split/class",))


def _classes_or_none(place: Place, folders: set[str]) -> tuple[str, ...]:
    """The readings of images in these folders: one folder alone may be no class, and the user is asked.

    So it is if its name says so, or if a text file that no reader knows may hold the classes.
    """
    described = len(folders) == 1 and any(kind(name) in TEXTS for name in place.files)
    return ("class", "images") if described or _is_container(folders) else ("class",)


def _is_container(folders: set[str]) -> bool:
    """Whether the only class would be called after what it holds."""
    words = re.split(r"[-_. \d]+", next(iter(folders)).lower())
    return len(folders) == 1 and not _CONTAINER_WORDS.isdisjoint(words)


def _asked(name: str, place: Place) -> _Layout:
    """The layout that the user names: folders around it are found, deeper ones play no part."""
    common, need = _common_folders(place.images), len(_LEVELS[name])
    shallowest = min(name.count("/") for name in place.images)
    depth = 0
    while depth < len(common) and shallowest - depth > need and not is_split(common[depth]):
        depth += 1
    around = "".join(f"{folder}/" for folder in common[:depth])
    for image in place.images:
        if image[len(around) :].count("/") < need:
            raise UserError(
                f"{place.path}: --as '{name}' needs {name}/IMAGE, which {printable(image)} is not"
            )
    return _Layout(around, (name,))


def _check_depth(place: Place, parts: list[list[str]]) -> int:
    """How many names a path has: that of the image and those of its folders."""
    depths = Counter(map(len, parts))
    depth = depths.most_common(1)[0][0]
    if odd := [part for part in parts if len(part) != depth or depth > 3]:
        where = printable("/".join(odd[0]))
        flat = f"; sort {odd[0][0]}/ into folders of classes, or leave it out (--skip {odd[0][0]})"
        help_ = (
            flat if len(odd[0]) < depth and len(odd[0]) > 1 else "; --as 'images' packs all without labels"
        )
        raise UserError(
            f"{place.path}: images must lie in split/class/, split/, class/ or no folder, all alike; {where} does not"
            + help_
        )
    return depth


def _check_sets(place: Place, parts: list[list[str]]) -> None:
    """Refuse several data sets beside each other, each with its splits."""
    if all(len(part) > 2 and is_split(part[1]) for part in parts):
        sets = sorted({part[0] for part in parts})
        raise UserError(
            f"{place.path}: holds splits in each of {', '.join(map(printable, sets[:5]))}; name one of these folders"
        )


def _build(name: str, around: str, place: Place) -> Reading:
    levels = _LEVELS[name]
    parts = _parts(place.images, around)
    splits = [split_name(part[0]) if "split" in levels else "" for part in parts]
    labels = [part[levels.index("class")] if "class" in levels else "" for part in parts]
    _check_same_split(place, parts if "split" in levels else [])
    classes = sorted(set(labels), key=os.fsencode) if "class" in levels else []
    check_folders(place, levels, around, parts)
    return Reading(
        name,
        summary(splits, classes),
        lambda: labeled_files(place, map(Row, place.images, splits, labels), classes),
        place.unpacked(place.images),
    )


def _check_same_split(place: Place, parts: list[list[str]]) -> None:
    folders: dict[str, str] = {}
    for part in parts:
        other = folders.setdefault(split_name(part[0]), part[0])
        if other != part[0]:
            raise UserError(f"{place.path}: {other}/ and {part[0]}/ are the same split; rename or --skip one")


def _common_folders(names: list[str]) -> list[str]:
    """The folders that all paths begin with; ``names`` are sorted."""
    first, last = names[0].split("/")[:-1], names[-1].split("/")[:-1]
    return [a for a, _ in _while_equal(first, last)]


def _while_equal(first: list[str], last: list[str]) -> Iterable[tuple[str, str]]:
    for a, b in zip(first, last, strict=False):
        if a != b:
            return
        yield a, b


def _parts(names: list[str], around: str) -> list[list[str]]:
    return [name[len(around) :].split("/") for name in names]


def _top(name: str, around: str) -> str:
    return name[len(around) :].partition("/")[0]


def _reader_of(name: str, recognizes: str, becomes: str) -> Reader:
    return Reader(name, recognizes, becomes, lambda place, choices: _find(name, place, choices), generality=2)


_LEVELS = {"split/class": ("split", "class"), "class": ("class",), "split": ("split",), "images": ()}

READERS = (
    _reader_of(
        "split/class", "`train/cat/1.jpg ...`, in a folder or archive", "a split for every outer folder"
    ),
    _reader_of("class", "`cat/1.jpg ...`; deeper folders only if asked for", "one split"),
    _reader_of("split", "`train/1.jpg ...`, all in folders named like splits", "the splits, without labels"),
    _reader_of("images", "`1.jpg ...`; deeper folders only if asked for", "one split without labels"),
)
