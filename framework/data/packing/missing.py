"""Splits and classes that would be missing from what is packed, though something at the source stands for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from framework.data.packing.place import Place, kind, kinds_text
from framework.data.shards.image_types import SUFFIXES, suffix
from framework.data.shards.naming import are_same_split, is_split, split_of
from framework.runtime.errors import UserError
from framework.runtime.text import printable

# Files that may say of which classes the images are.
TEXTS = {".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".mat", ".parquet"}
_ARCHIVES = (
    ".zip",
    ".7z",
    ".rar",
    ".tgz",
    ".tbz",
    ".tbz2",
    ".txz",
    ".tar.gz",
    ".tar.bz2",
    ".tar.xz",
    ".tar.zst",
    ".tar.lz4",
)


def check_folders(place: Place, levels: Sequence[str], around: str, parts: list[list[str]]) -> None:
    """Refuse folders of splits and classes in which nothing is an image, and what stands for such folders.

    Args:
        place: where the images are.
        levels: of folders, such as ("split", "class").
        around: folder around all of them, with a slash, or "".
        parts: folders and name of every image, below ``around``.

    Raises:
        UserError: a class, or a split, would silently be missing.
    """
    full = {"/".join(part[:depth]) for part in parts for depth in range(1, len(levels) + 1)}
    classes = {part[levels.index("class")] for part in parts} if "class" in levels else set()
    for folder in sorted(place.folders):
        inner = folder[len(around) :] if folder.startswith(around) else ""
        depth = inner.count("/") + 1
        if not inner or inner in full or depth > len(levels):
            continue
        level = levels[depth - 1]
        if level == "split" and not is_split(inner):
            continue
        if level == "class" and depth == 2 and inner.partition("/")[0] not in full:
            continue
        files = Counter(kind(file) for file in place.files if file.startswith(f"{folder}/"))
        if not files and (level == "split" or inner.rpartition("/")[2] in classes):
            continue
        found = f"none of its files is an image ({kinds_text(files)})" if files else "it is empty"
        raise UserError(
            f"{place.path}: the {level} {printable(inner)} would be missing: {found}; "
            f"convert its files, or leave it out (--skip '{printable(folder)}')"
        )
    _check_other_files(place, levels, around, full)


def _check_other_files(place: Place, levels: Sequence[str], around: str, full: set[str]) -> None:
    """Refuse what stands for a folder that is not among the ``full`` ones; plain tars are asked for as shards."""
    for name, stem, what in _in_place_of_folders(place):
        is_around = not name.startswith(around)
        inner = stem if is_around else stem[len(around) :]
        depth = inner.count("/") + 1
        if inner in full or depth > len(levels) or (is_around and levels[depth - 1] != "split"):
            continue
        if levels[depth - 1] == "split":
            _check_split(place, name, inner, what, full)
        elif inner != place.path.name and (depth == 1 or inner.partition("/")[0] in full):
            raise _missing(place, "class", inner, name, what)


def check_splits(place: Place, splits: Iterable[str]) -> None:
    """Refuse an archive, or a link that leads nowhere, beside the folders of splits if it stands for another one.

    Raises:
        UserError: there is one.
    """
    there = set(splits)
    for name, stem, what in _in_place_of_folders(place):
        if "/" not in name:
            _check_split(place, name, stem, what, there)


def _check_split(place: Place, name: str, stem: str, what: str, there: set[str]) -> None:
    split = split_of(stem)
    if split and not any(are_same_split(split, other) for other in there):
        raise _missing(place, "split", split, name, what)


def _missing(place: Place, level: str, missing: str, name: str, what: str) -> UserError:
    return UserError(
        f"{place.path}: the {level} {printable(missing)} would be missing: {printable(name)} is {what}, "
        f"or leave it out (--skip '{printable(name)}')"
    )


def _in_place_of_folders(place: Place) -> Iterator[tuple[str, str, str]]:
    """(path, path of the folder that it stands for, what it is and what to do) of archives and broken links."""
    for name in place.files:
        if name.lower().endswith(_ARCHIVES):
            ending = max((end for end in _ARCHIVES if name.lower().endswith(end)), key=len)
            yield name, name[: -len(ending)], "an archive; unpack it"
    for name in sorted(place.lost):
        if suffix(name) not in SUFFIXES | TEXTS:
            yield name, name, "a link that leads nowhere; mend it"
