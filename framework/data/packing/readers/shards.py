"""WebDataset shards, to be packed anew: a folder, a folder for each split, a pattern, or a URL."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from framework.data.packing.images import Images, ShardImages
from framework.data.packing.missing import check_splits
from framework.data.packing.place import Place
from framework.data.packing.readers.imagenet import is_download
from framework.data.packing.reading import Choices, Incomplete, Reader, Reading
from framework.data.shards.index import ShardSet
from framework.data.shards.labels import are_identifiers
from framework.data.shards.naming import check_one_series, cut_pattern, is_compressed, split_name
from framework.data.shards.remote import open_remote
from framework.data.shards.scan import groups
from framework.runtime.errors import UserError

_LABEL_KEYS = ("label", "cls", "class", "class_id", "class_name", "category", "target")
_OWN = {"index.json", "index.npz", "classes.json", "left_out.txt"}  # what lies beside shards that we packed


def read_files(paths: list[str], choices: Choices) -> Reading:
    """Shards that a shell has listed, all of one folder."""
    folders = {str(Path(path).parent) for path in paths}
    if len(folders) > 1 or not all(path.endswith(".tar") for path in paths):
        raise UserError(f"{paths[0]} ... {paths[-1]}: name one source, or shards (*.tar) of one folder")
    pattern = "::".join(Path(path).name for path in paths)
    return _reading({"": (Path(folders.pop()), pattern)}, f"{len(paths)} shards", choices)


def read_pattern(path: str, choices: Choices) -> Reading:
    """The shards of a folder that braces and globs name."""
    folder, pattern = cut_pattern(path)
    return _reading({"": (Path(folder), pattern)}, str(pattern), choices)


def read_url(url: str, choices: Choices, cache: Path, cache_bytes: int) -> Reading:
    """The shards of a URL, or those that a pattern at its end names."""
    folder, pattern = cut_pattern(url)

    def opened() -> dict[str, Images]:
        return {"": ShardImages(open_remote(folder, cache, cache_bytes, pattern))}

    return Reading("shards", url, opened)


def _find(place: Place, choices: Choices) -> Reading | None:
    if place.folder is None:
        if any(name.endswith(".cls") for name in place.files):
            raise UserError(
                f"{place.path}: is a shard; name the folder that it lies in, "
                f"or several such as '{place.path.parent}/*.tar'"
            )
        return None
    tars = _tars(place, ".tar", choices)
    folders = sorted({name.rpartition("/")[0] for name in tars if name.count("/") < 2})
    if not folders:
        _check_archives(place)
        return None
    if "" in folders and len(folders) > 1:
        raise UserError(
            f"{place.path}: holds shards, and so do its folders {', '.join(folders[1:])}; name one of them"
        )
    splits: dict[str, tuple[Path, str | None]] = {
        split_name(folder): (place.folder / folder, None) for folder in folders
    }
    if len(splits) < len(folders):
        raise UserError(f"{place.path}: {' and '.join(folders)} are the same split; rename or --skip one")
    if "" not in folders:
        check_splits(place, splits)
    for folder in folders:
        names = [name.rpartition("/")[2] for name in tars if name.rpartition("/")[0] == folder]
        check_one_series(place.path / folder, names)
    counts = Counter(name.rpartition("/")[0] for name in tars)
    summary = ", ".join(f"{folder} {counts[folder]} shards".strip() for folder in folders)
    packed = [name for name in place.files if name in tars or name.rpartition("/")[2] in _OWN]
    return _reading(splits, summary, choices, place.unpacked(packed))


def _tars(place: Place, suffix: str, choices: Choices) -> list[str]:
    names = [name for name in place.files if name.endswith(suffix)]
    return [name for name in names if choices.reader == "shards" or not is_download(name)]


def _check_archives(place: Place) -> None:
    """Refuse a folder of nothing but archives."""
    archives = [name for name in place.files if is_compressed(name) or name.endswith(".zip")]
    if archives and not place.images:
        raise Incomplete(
            f"{place.path}: holds no images but {len(archives)} archives such as {archives[0]}; name one as the source "
            f"if it holds a data set, or unpack them to .tar if they are shards"
        )


def _reading(
    folders: dict[str, tuple[Path, str | None]],
    summary: str,
    choices: Choices,
    unpacked: Counter[str] | None = None,
) -> Reading:
    left_out = Counter(unpacked or {})

    def opened() -> dict[str, Images]:
        sets = {split: ShardSet.open(*place, save_index=False) for split, place in folders.items()}
        for shards in sets.values():
            left_out.update({f".{name}": count for name, count in shards.passed_over.items()})
        return _labeled(sets, choices, left_out)

    return Reading("shards", summary, opened, left_out)


def _labeled(sets: dict[str, ShardSet], choices: Choices, left_out: Counter[str]) -> dict[str, Images]:
    """Take labels from ``.json`` where there are no others, and number those that are identifiers."""
    values: dict[str, list[Any]] = {}
    for split, shards in sets.items():
        if shards.labeled and choices.label_column is None:
            values[split] = shards.labels.tolist()
        elif found := _json_labels(shards, choices.label_column):
            values[split] = found
            left_out.pop(".json", None)
    every = {value for labels in values.values() for value in labels}
    numbers = all(type(value) is int for value in every)
    taken_over = numbers and not are_identifiers(np.array(sorted(every), np.int64))
    from_json = {split for split, shards in sets.items() if split in values and not shards.labeled}
    if not values or (taken_over and not from_json and choices.label_column is None):
        return {split: ShardImages(shards) for split, shards in sets.items()}
    if taken_over and min(every) >= 0:
        return {
            split: ShardImages(shards, np.array(values[split], np.int64) if split in values else None)
            for split, shards in sets.items()
        }
    order = sorted(every, key=lambda value: (0, value, "") if type(value) is int else (1, 0, str(value)))
    number = {value: label for label, value in enumerate(order)}
    names = [str(value) for value in order]
    return {
        split: ShardImages(shards, np.array([number[value] for value in values[split]]), names)
        if split in values
        else ShardImages(shards)
        for split, shards in sets.items()
    }


def _json_labels(shards: ShardSet, key: str | None) -> list[Any] | None:
    """The label of every sample by its ``.json``; ``None`` if these have none.

    Raises:
        UserError: several keys could be the label; some samples have one and some not.
    """
    if "json" not in shards.passed_over:
        return None
    found = [entry for name in shards.shards for entry in _json_entries(Path(shards.folder) / name)]
    if key is None:
        keys = [name for name in _LABEL_KEYS if any(name in entry for entry in found)]
        if len(keys) > 1:
            raise UserError(
                f"{shards.folder}: {' and '.join(keys)} of .json could each be the label; choose with --label-column"
            )
        if not keys:
            return None
        key = keys[0]
    labels = [entry.get(key) for entry in found]
    if len(labels) != len(shards) or any(not isinstance(label, int | str) for label in labels):
        raise UserError(f"{shards.folder}: not every sample's .json has a number or text as {key}")
    return labels


def _json_entries(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for key, group in groups(path, tar, Counter()):
            if "json" not in group:
                continue
            file.seek(group["json"].offset_data)
            try:
                entry = json.loads(file.read(group["json"].size))
            except ValueError as error:
                raise UserError(f"{path}: {key}.json is no JSON ({error})") from error
            yield entry if isinstance(entry, dict) else {}


READERS = (
    Reader(
        "shards",
        "WebDataset shards: a folder, a folder for each split, a pattern such as `'train-{000..127}.tar'`, a URL",
        "the same, anew; labels in `.json` become `.cls`",
        _find,
        generality=3,
    ),
)
