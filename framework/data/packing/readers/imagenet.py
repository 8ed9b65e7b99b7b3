"""ImageNet (ILSVRC2012) as it is downloaded: archives of archives, and labels in the development kit.

Nothing is unpacked: an image is read from its place in the outer archive.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from framework.data.packing.archives import tar_files
from framework.data.packing.images import FileImages, Images
from framework.data.packing.place import Place, open_folder
from framework.data.packing.reading import Choices, Incomplete, Reader, Reading
from framework.data.packing.rows import UNLABELED
from framework.data.shards.naming import split_name
from framework.data.shards.scan import PARSE_ERRORS
from framework.runtime.errors import UserError

_TRAIN, _VAL, _KIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12"
_CLASS_TAR = re.compile(r"(?:.*/)?(n\d{8})\.tar")
_VAL_IMAGE = re.compile(r"(?:.*/)?ILSVRC2012_val_\d{8}\.jpe?g", re.IGNORECASE)
_TRUTH, _META = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"


def is_download(name: str) -> bool:
    """Whether a path is that of one of the archives."""
    return name.rpartition("/")[2] in (_TRAIN, _VAL) or _CLASS_TAR.fullmatch(name) is not None


class _Kit(NamedTuple):
    """The development kit.

    Attributes:
        classes: WordNet IDs of the classes, sorted, which is the order of labels.
        val: label of every validation image, in the order of their names.
    """

    classes: list[str]
    val: list[int]


class _Tar(NamedTuple):
    """A tar below a place, or within a tar there.

    Attributes:
        name: path of the outermost file.
        start: offset of the tar in it.
        size: bytes of the tar.
    """

    name: str
    start: int
    size: int


def _find(place: Place, choices: Choices) -> Reading | None:
    whole = [name for name in place.files if name.rpartition("/")[2] in (_TRAIN, _VAL)]
    classes = [name for name in place.files if _CLASS_TAR.fullmatch(name)]
    if not whole and not classes:
        return _single_val(place)
    tars = {"train" if name.endswith(_TRAIN) else "val": [name] for name in whole}
    if len(tars) < len(whole):
        raise UserError(f"{place.path}: holds one of {', '.join(whole)} twice; --skip one")
    for name in classes:
        folder = name.rpartition("/")[0].rpartition("/")[2]
        split = split_name(folder) if folder else "train" if place.path.name == _TRAIN else ""
        if split in tars and tars[split][0] in whole:
            raise UserError(
                f"{place.path}: {name} and {tars[split][0]} are both of {split}; --skip one of them"
            )
        tars.setdefault(split, []).append(name)
    kit = _kit(place)
    if "val" in tars and tars["val"][0].endswith(_VAL) and kit is None:
        raise Incomplete(
            f"{place.path}: {_VAL} has no labels; lay {_KIT}.tar.gz (image-net.org) beside it, "
            f"or leave it out (--skip {_VAL})"
        )
    used = [name for names in tars.values() for name in names]
    summary = ", ".join(
        f"{split} from {names[0]}" + " ..." * (len(names) > 1) for split, names in tars.items()
    )
    skipped = place.unpacked([*used, *(name for name in place.files if _KIT in name)])
    return Reading("imagenet", summary, lambda: _open(place, tars, kit), skipped)


def _single_val(place: Place) -> Reading | None:
    """The validation archive alone, the kit lying beside it; or what to do about images without classes."""
    flat = [name for name in place.files if _VAL_IMAGE.fullmatch(name)]
    flat = [name for name in flat if not re.fullmatch(r"n\d{8}", name.split("/")[-2] if "/" in name else "")]
    if not flat:
        return None
    if place.path.name == _VAL:
        kit = _kit(open_folder(place.path.absolute().parent))
        if kit is None:
            raise Incomplete(f"{place.path}: has no labels; lay {_KIT}.tar.gz (image-net.org) beside it")
        images = _val_images(place, flat, kit, lambda i: place.read(flat[i]))
        return Reading(
            "imagenet", "val", lambda: {"val": images}, place.unpacked(flat), frozenset({"images"})
        )
    where = flat[0].rpartition("/")[0] or "."
    if (
        any(name.endswith("LOC_val_solution.csv") for name in place.files)
        or "CLS-LOC" in f"{place.path}/{where}"
    ):
        raise Incomplete(
            f"{place.path}: is Kaggle's ImageNet, whose val/ has no folders of classes; in ILSVRC/Data/CLS-LOC run: "
            f"tail -n +2 ../../../LOC_val_solution.csv | while IFS=', ' read i c x; do mkdir -p val/$c; "
            f"mv val/$i.JPEG val/$c/; done; then pack ILSVRC/Data/CLS-LOC with --skip test"
        )
    raise Incomplete(
        f"{place.path}: {where}/ holds ImageNet's validation images without folders of classes; sort them into "
        f"{where}/n01440764/ ..., or lay the downloads {_VAL} and {_KIT}.tar.gz there in its place"
    )


def _open(place: Place, tars: dict[str, list[str]], kit: _Kit | None) -> dict[str, Images]:
    splits: dict[str, Images] = {}
    for split, names in tars.items():
        if names[0].endswith(_VAL):
            extents = _extents(place, _Tar(names[0], 0, place.contents.size(names[0])))
            files = sorted(extents)
            splits[split] = _val_images(place, files, kit, _pread(place, [extents[name] for name in files]))
        else:
            splits[split] = _class_images(place, names, kit)
    return splits


def _val_images(place: Place, names: list[str], kit: _Kit | None, read: Any) -> FileImages:
    assert kit is not None
    if len(names) != len(kit.val):
        raise UserError(
            f"{place.path}: has {len(names)} validation images, and {_KIT} labels {len(kit.val)}; download both again"
        )
    return FileImages(sorted(names), kit.val, kit.classes, read, str(place.path))


def _class_images(place: Place, names: list[str], kit: _Kit | None) -> FileImages:
    """The images of archives that are a class each; ``names`` are these, or the one archive around them."""
    found: dict[str, _Tar] = {}
    for name in names:
        whole = _Tar(name, 0, place.contents.size(name))
        if match := _CLASS_TAR.fullmatch(name):
            found[match[1]] = whole
        else:
            inner = _extents(place, whole)
            found |= {
                match[1]: tar for inside, tar in inner.items() if (match := _CLASS_TAR.fullmatch(inside))
            }
    classes = kit.classes if kit else sorted(found)
    if missing := sorted(set(classes) ^ set(found)):
        raise UserError(
            f"{place.path}: {missing[0]}, one of {len(missing)}, is a class in "
            f"{'its archives and not in ' + _KIT if missing[0] in found else _KIT + ' and not in its archives'}"
        )
    files: list[str] = []
    labels: list[int] = []
    extents: list[_Tar] = []
    for label, wnid in enumerate(classes):
        inner = _extents(place, found[wnid])
        if not inner:
            raise UserError(f"{place.path}: the archive of class {wnid} is empty; download it again")
        files += [f"{wnid}/{name}" for name in sorted(inner)]
        extents += [inner[name] for name in sorted(inner)]
        labels += [label] * len(inner)
    return FileImages(files, labels, classes, _pread(place, extents), str(place.path))


def _extents(place: Place, tar: _Tar) -> dict[str, _Tar]:
    """Where the files of a tar lie."""
    where = place.path / tar.name
    try:
        extents, _, _ = tar_files(where, place.open_part(tar.name, tar.start, tar.size))
    except (OSError, *PARSE_ERRORS) as error:
        raise UserError(f"{where}: not a whole tar ({error}); download it again") from error
    return {name: _Tar(tar.name, tar.start + offset, size) for name, (offset, size) in extents.items()}


def _pread(place: Place, extents: list[_Tar]) -> Any:
    """Reads image i; the extents are kept as arrays, for there are 1.28 million."""
    files = sorted({extent.name for extent in extents})
    number = {name: i for i, name in enumerate(files)}
    table = np.array([(number[name], start, size) for name, start, size in extents], np.int64).reshape(-1, 3)

    def read(i: int) -> bytes:
        file, start, size = table[i].tolist()
        return place.contents.pread(files[file], start, size)

    return read


def _kit(place: Place) -> _Kit | None:
    """The development kit in a place, packed or unpacked.

    Raises:
        UserError: it is damaged.
    """
    for name in place.files:
        base = name.rpartition("/")[2]
        try:
            if base.startswith(_KIT) and base.endswith((".tar.gz", ".tgz", ".tar")) and place.folder:
                return _parsed_kit(dict(_kit_archive(place.folder / name)))
            if f"/{name}".endswith(f"/{_META}"):
                root = name.removesuffix(_META)
                return _parsed_kit({end: place.read(root + end) for end in (_META, _TRUTH)})
        except UserError:
            raise
        except Exception as error:  # of SciPy, which raises nearly everything
            raise UserError(
                f"{place.path / name}: not a whole development kit ({error}); download it again"
            ) from error
    return None


def _kit_archive(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        for member in tar:
            for end in (_META, _TRUTH):
                if member.name.endswith(end) and (file := tar.extractfile(member)):
                    yield end, file.read()


def _parsed_kit(files: dict[str, bytes]) -> _Kit:
    """As torchvision reads it: of ``meta.mat`` the synsets without children, each (ID, wnid, ..., children, ...)."""
    from scipy.io import loadmat  # type: ignore[import-untyped]

    synsets = loadmat(io.BytesIO(files[_META]), squeeze_me=True)["synsets"]
    wnid = {
        int(synset[0]): str(synset[1]) for synset in np.atleast_1d(synsets).tolist() if int(synset[4]) == 0
    }
    classes = sorted(wnid.values())
    label = {number: classes.index(name) for number, name in wnid.items()}
    return _Kit(classes, [label[int(number)] for number in files[_TRUTH].split()])


READERS = (
    Reader(
        "imagenet",
        f"ImageNet's downloads: `{_TRAIN}` (or the `n01440764.tar ...` in it), `{_VAL}` and `{_KIT}.tar.gz`",
        "`train`, `val`",
        _find,
        overrules=UNLABELED,
    ),
)
