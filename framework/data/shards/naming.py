"""Shards named by a pattern: braces and globs, as users of ``webdataset`` write them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from braceexpand import braceexpand

from framework.runtime.errors import UserError

# Words that name a split: train, Validation, val_images, test-data, train2017.
SPLIT_WORDS = r"(?:train|training|val|valid|validation|dev|test|testing|eval|unlabell?ed|extra)"
_SAME_WORD = {"dev": "val", "unlabelled": "unlabeled"}
_SPLIT = re.compile(SPLIT_WORDS + r"([-_ ]?(images|imgs|set|data))?[-_ ]?\d*", re.IGNORECASE)
_SEPARATORS = re.compile(r"([-_.]+)")
_COMPRESSED = re.compile(r".*\.(tgz|tbz2?|txz|tar\.(gz|bz2|xz|zst|lz4))", re.IGNORECASE)


def is_split(name: str) -> bool:
    """Whether a folder of that name is a split of a data set rather than a class."""
    return _SPLIT.fullmatch(name) is not None


def split_name(folder: str) -> str:
    """What a split is called after its folder: ``Train`` is ``train``."""
    return folder.lower() if is_split(folder) else folder


def split_of(name: str) -> str:
    """The word in the name of shards that names their split, or ""."""
    return next((word for word in re.split(r"[-_.*]+", name) if is_split(word)), "")


def are_same_split(one: str, other: str) -> bool:
    """Whether two names are of one split, as ``val.csv`` and ``Validation_images/``; any other split has no name."""
    return one == other or (is_split(one) and is_split(other) and _word(one) == _word(other))


def _word(split: str) -> str:
    match = re.match(SPLIT_WORDS, split, re.IGNORECASE)
    word = match[0].lower() if match else split
    return _SAME_WORD.get(word, word)


def is_held_out(name: str) -> bool:
    """Whether a split of that name is one to measure on."""
    return is_split(name) and not name.lower().startswith(("train", "unlabel", "extra"))


def is_compressed(name: str) -> bool:
    """Whether a file name is that of a compressed tar, which can't be read at random."""
    return _COMPRESSED.fullmatch(name) is not None


def names_shards(path: str) -> bool:
    """Whether a path names shards rather than a folder: its last part has braces or globs, or ends in ``.tar``."""
    last = path.rstrip("/").rpartition("/")[2]
    return last.endswith(".tar") or any(sign in last for sign in "{}*?[]")


def cut_pattern(path: str) -> tuple[str, str | None]:
    """(folder, pattern) of a path that names shards; (path, ``None``) of one that names a folder."""
    if not names_shards(path):
        return path, None
    folder, slash, pattern = path.rpartition("/")
    return (folder or slash or "."), pattern


def matching(where: object, names: Iterable[str], pattern: str) -> list[str]:
    """The names that a pattern stands for, sorted.

    Args:
        where: the folder, for messages.
        names: of all shards there.
        pattern: ``train-{000..127}.tar``, ``train-*.tar``, or several with ``::`` between them.

    Raises:
        UserError: a name without globs is not there; a glob matches none; braces that don't close.
    """
    there = set(names)
    found: set[str] = set()
    for part in pattern.split("::"):
        try:
            expanded = list(braceexpand(part))
        except ValueError as error:
            raise UserError(f"{where}/{part}: braces that don't close") from error
        for name in expanded:
            matches = {other for other in there if other == name or fnmatchcase(other, name)}
            if not matches:
                raise UserError(f"{where}/{name}: no such shard; the folder has {series_text(there)}")
            found |= matches
    return sorted(found)


def series(names: Iterable[str]) -> dict[str, list[str]]:
    """Shard names by their series, a glob that fits all its numbers: ``a-000.tar``, ``a-001.tar`` -> ``a-*.tar``.

    Names without a number are a series each if a word in them names a split; the others belong together.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        words = _SEPARATORS.split(name.removesuffix(".tar"))
        glob = "".join(re.sub(r"^([A-Za-z]*)\d+$", r"\1*", word) for word in words)
        if "*" not in glob and not any(is_split(word) for word in words):
            glob = "*"
        found.setdefault(f"{glob}.tar", []).append(name)
    if len(found) > 1 and (others := found.pop("*.tar", None)):
        numbers = [glob for glob in found if "*" in glob]
        found.setdefault(numbers[0] if len(numbers) == 1 else "*.tar", []).extend(others)
    return found


def check_one_series(where: object, names: Iterable[str]) -> None:
    """Refuse a folder that holds shards of several sets, such as ``imagenet-train-*.tar`` and ``imagenet-val-*.tar``.

    Raises:
        UserError: it does; the message names the series.
    """
    if len(series(names)) > 1:
        raise UserError(
            f"{where}: holds shards of several sets, {series_text(names)}; name those you mean, such as "
            f"'{next(iter(series(names)))}' ('*.tar' for all)"
        )


def series_text(names: Iterable[str]) -> str:
    """Every series with its number of shards, for messages."""
    counts = [f"{glob} ({len(members)})" for glob, members in series(names).items()]
    return ", ".join(counts[:5] + ["..."] * (len(counts) > 5)) or "none"
