"""Small data sets in the folders that torchvision's classes make of their downloads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from framework.data.packing.images import ArrayImages, Images
from framework.data.packing.place import Place
from framework.data.packing.reading import Choices, Incomplete, Reader, Reading
from framework.runtime.errors import UserError


class _Set(NamedTuple):
    """One of them.

    Attributes:
        title: as its authors write it.
        marks: files or folders that lie in its root, any of which tells it.
        downloads: names of the archive from which they come, if any.
        files: (path below the root, MD5) of what must be there, given torchvision's ``datasets`` and the root.
        read: the splits, given ``datasets`` and the root.
    """

    title: str
    marks: tuple[str, ...]
    download: str
    files: Callable[[Any, Path], Iterable[tuple[str, str]]]
    read: Callable[[Any, Path], dict[str, Images]]


def _cifar_files(kind: str) -> Callable[[Any, Path], Iterable[tuple[str, str]]]:
    def files(datasets: Any, root: Path) -> Iterable[tuple[str, str]]:
        cls = getattr(datasets, kind)
        for name, md5 in [*cls.train_list, *cls.test_list, (cls.meta["filename"], cls.meta["md5"])]:
            yield f"{cls.base_folder}/{name}", md5

    return files


def _cifar(kind: str) -> Callable[[Any, Path], dict[str, Images]]:
    def read(datasets: Any, root: Path) -> dict[str, Images]:
        sets = {name: getattr(datasets, kind)(str(root), train=name == "train") for name in ("train", "test")}
        return {
            name: ArrayImages(data.data, np.array(data.targets), data.classes) for name, data in sets.items()
        }

    return read


def _stl10_files(datasets: Any, root: Path) -> Iterable[tuple[str, str]]:
    for name, md5 in [*datasets.STL10.train_list, *datasets.STL10.test_list]:
        yield f"{datasets.STL10.base_folder}/{name}", md5


def _stl10(datasets: Any, root: Path) -> dict[str, Images]:
    sets = {name: datasets.STL10(str(root), split=name) for name in ("train", "test", "unlabeled")}
    return {
        name: ArrayImages(
            data.data.transpose(0, 2, 3, 1), None if name == "unlabeled" else data.labels, data.classes
        )
        for name, data in sets.items()
    }


def _svhn_splits(root: Path) -> list[str]:
    return [name for name in ("train", "test", "extra") if (root / f"{name}_32x32.mat").exists()]


def _svhn_files(datasets: Any, root: Path) -> Iterable[tuple[str, str]]:
    for split in _svhn_splits(root):
        _, name, md5 = datasets.SVHN.split_list[split]
        yield name, md5


def _svhn(datasets: Any, root: Path) -> dict[str, Images]:
    sets = {name: datasets.SVHN(str(root), split=name) for name in _svhn_splits(root)}
    digits = [str(digit) for digit in range(10)]
    return {
        name: ArrayImages(data.data.transpose(0, 2, 3, 1), data.labels, digits) for name, data in sets.items()
    }


_SETS = {
    "cifar10": _Set(
        "CIFAR-10",
        ("cifar-10-batches-py",),
        "cifar-10-python.tar.gz",
        _cifar_files("CIFAR10"),
        _cifar("CIFAR10"),
    ),
    "cifar100": _Set(
        "CIFAR-100",
        ("cifar-100-python",),
        "cifar-100-python.tar.gz",
        _cifar_files("CIFAR100"),
        _cifar("CIFAR100"),
    ),
    "stl10": _Set("STL-10", ("stl10_binary",), "stl10_binary.tar.gz", _stl10_files, _stl10),
    "svhn": _Set("SVHN", ("train_32x32.mat", "test_32x32.mat", "extra_32x32.mat"), "", _svhn_files, _svhn),
}


def _find(name: str, place: Place, choices: Choices) -> Reading | None:
    kind = _SETS[name]
    roots = _roots(kind, place)
    if len(roots) > 1:
        raise UserError(
            f"{place.path}: holds {kind.title} {len(roots)} times, in {' and '.join(map(str, roots))}; name one"
        )
    if place.folder is None or not roots:
        _check_unpacked(kind, place)
        return None
    root = roots[0]
    mine = [file for file in place.files if any(mark in f"{place.path / file}" for mark in kind.marks)]
    return Reading(name, kind.title, lambda: _open(kind, root), place.unpacked(mine))


def _roots(kind: _Set, place: Place) -> list[Path]:
    """Folders that hold the marks: the place, one folder around it, or one below."""
    if place.path.name in kind.marks:
        return [place.path.parent]
    names = [*place.files, *place.folders]
    tails = [name.rpartition("/") for name in names if name.count("/") < 2]
    return sorted({place.path / tail[0] for tail in tails if tail[2] in kind.marks})


def _check_unpacked(kind: _Set, place: Place) -> None:
    """Say what to do with a download, or with an archive of its files."""
    archives = [place.path / name for name in place.files if name.rpartition("/")[2] == kind.download]
    if place.folder is None and any(name.split("/")[0] in kind.marks for name in place.files):
        archives = [place.path]
    if archives:
        raise Incomplete(
            f"{archives[0]}: is the archive of {kind.title}; unpack it (tar xf {archives[0].name}) and name the folder "
            f"in which {kind.marks[0]} then lies"
        )


def _open(kind: _Set, root: Path) -> dict[str, Images]:
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity

    for name, md5 in kind.files(datasets, root):
        if not check_integrity(str(root / name), md5):
            problem = "is damaged or of another version" if (root / name).exists() else "is missing"
            source = f" (it comes in {kind.download})" if kind.download else ""
            raise UserError(
                f"{root}: {kind.title} not found or corrupted: {name} {problem}; download it again{source}"
            )
    try:
        return kind.read(datasets, root)
    except RuntimeError as error:
        raise UserError(f"{root}: {' '.join(str(error).split())}") from error


def _reader_of(name: str, becomes: str) -> Reader:
    kind = _SETS[name]
    marks = " or ".join(f"`{mark}`" for mark in kind.marks)
    return Reader(
        name,
        f"{kind.title} as torchvision keeps it: the folder that holds {marks}",
        becomes,
        lambda place, choices: _find(name, place, choices),
    )


READERS = (
    _reader_of("cifar10", "`train`, `test`"),
    _reader_of("cifar100", "`train`, `test`"),
    _reader_of("stl10", "`train`, `test`, `unlabeled`"),
    _reader_of("svhn", "those of `train`, `test`, `extra` that are there"),
)
