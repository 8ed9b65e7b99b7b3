"""Images as they lie around: folders, archives, torchvision's data sets, other shards."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from statistics import mode
from typing import BinaryIO, NamedTuple, Protocol, cast

import numpy as np
from torchvision import datasets

from framework.data.shards.index import ShardSet
from framework.data.shards.remote import open_remote
from framework.data.shards.scan import PARSE_ERRORS, UNLABELED, check_end, members
from framework.data.shards.store import is_url
from framework.runtime.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

# Where all folders of images are named so, they are splits and not classes.
_SPLITS = {"train", "val", "valid", "validation", "test", "unlabeled", "extra"}


class Item(NamedTuple):
    """One image.

    Attributes:
        where: for messages.
        image: encoded bytes, or (H, W, 3) uint8 pixels.
        label: its class or ``None``.
    """

    where: str
    image: bytes | np.ndarray
    label: int | None


class Source(Protocol):
    """The images of one split, read at random and from forked processes.

    Attributes:
        classes: names of the labels, or ``None``.
        identity: changes when the source does.
    """

    classes: list[str] | None
    identity: str

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Item: ...


class Files:
    """Images in named places.

    Args:
        names: path below the source, in order.
        labels: of each, or ``None``.
        read: the bytes of a path.
        identity: tells this source from others, besides the names and labels.
    """

    def __init__(
        self,
        names: list[str],
        labels: list[int] | None,
        classes: list[str] | None,
        read: Callable[[str], bytes],
        identity: str,
    ) -> None:
        self.names, self.labels, self.classes, self._read = names, labels, classes, read
        self.identity = _digest([identity, *names, *map(str, labels or [])])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Item:
        name = self.names[i]
        return Item(name, self._read(name), self.labels[i] if self.labels else None)


class Pixels:
    """Images in one array (N, H, W, 3) uint8, with labels (N,) or ``None``."""

    def __init__(self, images: np.ndarray, labels: np.ndarray | None, classes: list[str] | None) -> None:
        self.images, self.labels, self.classes = images, labels, classes
        contents = hashlib.sha256(np.ascontiguousarray(images).data)
        self.identity = contents.hexdigest() + _digest([] if labels is None else map(str, labels.tolist()))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Item:
        return Item(f"image {i}", self.images[i], None if self.labels is None else int(self.labels[i]))


class Shards:
    """Images of shards."""

    def __init__(self, shards: ShardSet) -> None:
        self.shards, self.classes = shards, shards.classes
        self.identity = _digest([str(shards.folder), str(shards.shards), str(shards.contents.sha256)])

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, i: int) -> Item:
        label = int(self.shards.labels[i])
        return Item(self.shards.where(i), self.shards.read(i), None if label == UNLABELED else label)


def open_sources(path: str, work: Path, cache: Path, cache_bytes: int) -> dict[str, Source]:
    """The splits of whatever lies at ``path``, by name; a source without splits has one, named "".

    Args:
        path: a folder of images (split/class/image, split/image, class/image or image); a tar or tar.gz of
            one; the root folder of CIFAR-10, CIFAR-100, STL-10, SVHN or ImageNet as torchvision keeps them;
            shards, in one folder or one per split; the URL of a folder of shards.
        work: an existing folder with room to unpack a tar.gz (nothing is left in it).
        cache: for shards of a URL.
        cache_bytes: its bound.

    Raises:
        UserError: nothing of these is there, or it is damaged.
    """
    if is_url(path):
        return {"": Shards(open_remote(path, cache, cache_bytes))}
    place = Path(path)
    if place.is_file():
        return _archive(place, work)
    if not place.is_dir():
        raise UserError(f"{place}: no such file or folder")
    for mark, reader in _TORCHVISION.items():
        if (place / mark).exists():
            return _torchvision(place, reader)
    if any(place.glob("*.tar")):
        return {"": Shards(ShardSet.open(place))}
    splits = sorted(folder for folder in place.iterdir() if folder.is_dir() and any(folder.glob("*.tar")))
    if splits:
        return {folder.name: Shards(ShardSet.open(folder)) for folder in splits}
    return _folder(place)


def _folder(root: Path) -> dict[str, Source]:
    def failed(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error

    names = [
        os.path.relpath(os.path.join(folder, name), root)
        for folder, _, files in os.walk(root, onerror=failed, followlinks=True)
        for name in files
    ]
    return _by_folders(root, names, lambda name: (root / name).read_bytes())


def _archive(path: Path, work: Path) -> dict[str, Source]:
    try:
        file = _unpacked(path, work)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            places = {
                str(PurePosixPath(member.name)): (member.offset_data, member.size)
                for member in members(path, tar)
                if member.isreg()
            }
            check_end(path, file, tar.offset)
    except (OSError, EOFError, zlib.error, *PARSE_ERRORS) as error:
        raise UserError(f"{path}: not a whole tar or tar.gz ({error})") from error
    if any(name.endswith(".cls") for name in places):
        raise UserError(f"{path}: is a shard; name the folder that it lies in")

    def read(name: str) -> bytes:
        offset, size = places[name]
        return os.pread(file.fileno(), size, offset)

    return _by_folders(path, places, read)


def _unpacked(path: Path, work: Path) -> BinaryIO:
    """The archive, or what is in the gzip file, as an unnamed file of which a kill leaves nothing."""
    file = open(path, "rb")  # noqa: SIM115  # read as long as the source is used
    if file.read(2) != b"\x1f\x8b":
        file.seek(0)
        return file
    unpacked = tempfile.TemporaryFile(dir=work)  # noqa: SIM115
    with file, gzip.open(path) as zipped:
        shutil.copyfileobj(zipped, unpacked, 1 << 20)
    unpacked.seek(0)
    return cast(BinaryIO, unpacked)


def _by_folders(root: Path, names: Iterable[str], read: Callable[[str], bytes]) -> dict[str, Source]:
    """Splits and classes from the folders of image paths."""
    images = [PurePosixPath(name) for name in sorted(names)]
    images = [name for name in images if name.suffix.lower() in SUFFIXES and not name.name.startswith(".")]
    if not images:
        raise UserError(f"{root}: holds no images ({' '.join(sorted(SUFFIXES))})")
    depth = mode(len(name.parts) for name in images)
    if odd := [name for name in images if len(name.parts) != depth or depth > 3]:
        raise UserError(
            f"{root}: images must lie in split/class/, split/, class/ or no folder, all alike; {odd[0]} does not"
        )
    in_splits = depth == 3 or {name.parts[0] for name in images} <= _SPLITS
    classes = sorted({name.parts[-2] for name in images}) if depth > 1 + in_splits else None
    number = {name: i for i, name in enumerate(classes or [])}
    splits: dict[str, list[PurePosixPath]] = {}
    for name in images:
        splits.setdefault(name.parts[0] if in_splits else "", []).append(name)
    return {
        split: Files(
            [str(name) for name in found],
            [number[name.parts[-2]] for name in found] if classes else None,
            classes,
            read,
            str(root),
        )
        for split, found in splits.items()
    }


def _cifar(kind: type[datasets.CIFAR10]) -> Callable[[Path], dict[str, Source]]:
    def read(root: Path) -> dict[str, Source]:
        sets = {name: kind(str(root), train=name == "train") for name in ("train", "test")}
        return {name: Pixels(data.data, np.array(data.targets), data.classes) for name, data in sets.items()}

    return read


def _stl10(root: Path) -> dict[str, Source]:
    sets = {name: datasets.STL10(str(root), split=name) for name in ("train", "test", "unlabeled")}
    return {
        name: Pixels(
            data.data.transpose(0, 2, 3, 1), None if name == "unlabeled" else data.labels, data.classes
        )
        for name, data in sets.items()
    }


def _svhn(root: Path) -> dict[str, Source]:
    names = [name for name in ("train", "test", "extra") if (root / f"{name}_32x32.mat").exists()]
    sets = {name: datasets.SVHN(str(root), split=name) for name in names}
    digits = [str(digit) for digit in range(10)]
    return {name: Pixels(data.data.transpose(0, 2, 3, 1), data.labels, digits) for name, data in sets.items()}


_TORCHVISION: dict[str, Callable[[Path], dict[str, Source]]] = {
    "cifar-10-batches-py": _cifar(datasets.CIFAR10),
    "cifar-100-python": _cifar(datasets.CIFAR100),
    "stl10_binary": _stl10,
    "train_32x32.mat": _svhn,
}  # ImageNet's own root is a folder of images


def _torchvision(root: Path, reader: Callable[[Path], dict[str, Source]]) -> dict[str, Source]:
    try:
        return reader(root)
    except RuntimeError as error:
        raise UserError(f"{root}: {' '.join(str(error).split())}") from error


def _digest(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()
