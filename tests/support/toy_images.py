"""Images, trees and archives for the tests of packing."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat


def image(number: int, size: tuple[int, int] = (12, 8), form: str = "png", mode: str = "RGB") -> bytes:
    """Noise, another for every number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, form)
    return buffer.getvalue()


def tree(root: Path, files: dict[str, bytes]) -> Path:
    """A folder with these files."""
    root.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def photographs(splits: tuple[str, ...] = ("train/", "val/")) -> dict[str, bytes]:
    """Six cats and six dogs in every split."""
    return {
        f"{split}{name}/{number}.png": image(number)
        for split in splits
        for name in ("cat", "dog")
        for number in range(6)
    }


def tar(members: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    """An archive; ``links`` are symbolic, by name and target."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    return buffer.getvalue()


def shard(first: int, n: int = 4, classes: int | None = 2, suffix: str = "png") -> bytes:
    """A shard of n images; with ``classes`` they have labels."""
    members = {}
    for i in range(n):
        members[f"{i:04d}.{suffix}"] = image(first + i)
        if classes:
            members[f"{i:04d}.cls"] = b"%d" % (i % classes)
    return tar(members)


WNIDS = ("n01440764", "n01443537", "n02084071")


def imagenet_train() -> dict[str, bytes]:
    """Three classes of three images, an archive for each."""
    return {
        f"{wnid}.tar": tar({f"{wnid}_{i}.JPEG": image(10 * k + i, form="jpeg") for i in range(3)})
        for k, wnid in enumerate(WNIDS)
    }


def imagenet_val() -> dict[str, bytes]:
    """Four images; ``imagenet_kit`` has their classes."""
    return {f"ILSVRC2012_val_{i:08d}.JPEG": image(50 + i, form="jpeg") for i in range(1, 5)}


VAL_CLASSES = (2, 0, 1, 2)  # of the validation images, in the order of WNIDS


def imagenet_kit() -> dict[str, bytes]:
    """The development kit for both: IDs in another order than WNIDS, and one synset that is no class."""
    texts = ["ILSVRC2012_ID", "WNID", "words", "gloss"]
    fields = [*texts, "num_children", "children", "wordnet_height", "num_train_images"]
    synsets = np.zeros(4, dtype=[(name, object) for name in fields])
    for i, wnid in enumerate([WNIDS[2], WNIDS[0], WNIDS[1], "n00000001"]):
        synsets[i] = (i + 1, wnid, "a, b", "text", 3 * (i == 3), np.zeros(0), 0, 3)
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets})
    folder = "ILSVRC2012_devkit_t12/data"
    truth = b"1\n2\n3\n1\n"
    return {
        f"{folder}/meta.mat": buffer.getvalue(),
        f"{folder}/ILSVRC2012_validation_ground_truth.txt": truth,
    }
