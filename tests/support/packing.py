"""How the tests of packing ask readers."""

from __future__ import annotations

from pathlib import Path

import pytest

from framework.data.packing.images import Images
from framework.data.packing.packer import Packing, pack_splits
from framework.data.packing.readers import read
from framework.data.packing.reading import Choices, Reading
from framework.data.shards.index import ShardSet
from framework.runtime.errors import UserError


def reading(source: Path | str, work: Path, **choices: object) -> Reading:
    work.mkdir(exist_ok=True)
    return read([str(source)], Choices(**choices), work, work / "cache", 10**9)


def refused(source: Path | str, work: Path, **choices: object) -> str:
    with pytest.raises(UserError) as error:
        reading(source, work, **choices).open()
    assert "\n" not in str(error.value)
    return str(error.value)


def classes_of(images: Images) -> dict[str, str]:
    """File name -> name of its class."""
    names = images.classes or []
    return {images[i].where: names[images[i].label] for i in range(len(images))}


def sizes(found: dict[str, Images]) -> dict[str, int]:
    return {split: len(images) for split, images in found.items()}


def some(files: dict[str, bytes], count: int) -> dict[str, bytes]:
    """The first of them."""
    return dict(list(files.items())[:count])


def snapshot(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


def packed(source: str | Path, dest: Path, workers: int = 0, **options: object) -> dict[str, ShardSet]:
    packing = Packing(**{"samples_per_shard": 5, **options})
    dest.parent.mkdir(exist_ok=True)
    splits = opened(source, dest.parent)
    list(pack_splits(splits, dest, packing, workers))
    return {split: ShardSet.open(dest / split) for split in splits}


def opened(source: str | Path, work: Path) -> dict[str, Images]:
    return read([str(source)], Choices(), work, work / "cache", 10**9).open()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
