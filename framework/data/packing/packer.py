"""Images packed into shards: in parallel, to the same bytes every time, going on where it was stopped."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from framework.data.loading.decode import BrokenImage, decode
from framework.data.packing.images import Images
from framework.data.packing.reading import check_destination
from framework.data.packing.writer import Example, clear, new_folder, shard_name, write_classes, write_shard
from framework.data.shards.index import index_shards
from framework.data.shards.naming import is_held_out, is_split
from framework.data.shards.shard_contents import INDEX
from framework.runtime.errors import UserError
from framework.runtime.files import sha256_of, write_whole
from framework.runtime.text import printable

_FORMATS = {
    "JPEG": "jpg",
    "MPO": "jpg",  # JPEG of a camera, further pictures behind the first
    "PNG": "png",
    "WEBP": "webp",
    "PPM": "ppm",
}  # what a shard may hold, by Pillow's name
_SETTINGS, _OLD_SETTINGS = "packing.json", "plan.json"  # what a stopped attempt packed, and how
_FINISHED = ".packing.json"  # the splits that are finished, until all are
_LEFT_OUT = "left_out.txt"
_SHUFFLE = 0  # seed of the order in which samples are stored


@dataclass(frozen=True)
class Packing:
    """How images are stored.

    Attributes:
        samples_per_shard: at most.
        shorter_side: larger images are shrunk to this many pixels; ``None`` shrinks none.
        encode: "keep" stores the bytes of JPEG, PNG, WebP and PPM files as they are, and everything else as
            PNG; "jpg", "png" or "webp" encode anew.
        quality: of "jpg" and "webp", and of what "keep" has to shrink; 1 to 100.
    """

    samples_per_shard: int = 1000
    shorter_side: int | None = None
    encode: str = "keep"
    quality: int = 90


def pack_splits(
    splits: dict[str, Images], dest: Path, packing: Packing, workers: int
) -> Iterator[tuple[str, int, list[str]]]:
    """Pack every split into a folder of its name below ``dest``, the split "" into ``dest``.

    Yields, as ``pack``, samples and what is wrong with those left out, for each shard, with its split in front. Stopped
    between two splits, the same call goes on with those that are not finished.

    Raises:
        UserError: as ``pack``; a split's name can't be that of a folder.
    """
    for split in splits:
        _check_split(split, dest)
    record = dest / _FINISHED
    finished: dict[str, str] = json.loads(record.read_bytes()) if record.exists() else {}
    for split, images in splits.items():
        settings = sha256_of(json.dumps(_settings(images, packing)).encode())
        if finished.get(split) == settings and (dest / split / INDEX.head).exists():
            left_out = dest / split / _LEFT_OUT
            yield split, len(images), left_out.read_text().splitlines() if left_out.exists() else []
            continue
        for samples, broken in pack(images, dest / split, packing, workers):
            yield split, samples, broken
        if len(splits) > 1:
            finished[split] = settings
            write_whole(record, json.dumps(finished))
    record.unlink(missing_ok=True)


def _check_split(split: str, dest: Path) -> None:
    if split in (".", "..") or "/" in split:
        raise UserError(
            f"split {printable(split)!r}: is no name of a folder; call it train, test or the like"
        )
    folder = dest / split
    around = check_destination(folder)
    if not os.access(around, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: cannot be written: {around} is read-only")
    if folder.is_symlink():  # it would have to be replaced
        raise UserError(f"{folder}: is a link; name the folder {folder.resolve()} itself")


def training_needs(dest: Path, splits: Collection[str]) -> str:
    """The overrides with which a recipe trains on what was packed."""
    if "" in splits:
        if is_split(dest.name):
            key = "train" if dest.name.startswith("train") else "test"
            return f"data.path={dest.parent} data.{key}={dest.name}"
        return f"data.path={dest} data.train=."
    needs = [f"data.path={dest}"]
    held_out = [split for split in splits if is_held_out(split)]
    others = sorted(set(splits) - set(held_out), key=lambda split: not split.startswith("train"))
    if others and others[0] != "train":
        needs.append(f"data.train={others[0]}")
    if held_out and not {"test", "val"} & set(held_out):
        needs.append(f"data.test={held_out[0]}")
    return " ".join(needs) + ("" if others else f", which has {' and '.join(held_out)} and still lacks train")


def pack(images: Images, folder: Path, packing: Packing, workers: int) -> Iterator[tuple[int, list[str]]]:
    """Write the shards of ``folder``; yields the samples of each, and what is wrong with those left out.

    Samples are stored in an order mixed once and for all, so that classes are spread over shards. The folder
    appears when all are written. Stopped in between, the same call goes on after the last whole shard.

    Args:
        images: of one split.
        folder: does not exist yet, or is empty.
        packing: how they are stored.
        workers: processes that write; 0 writes in this one.

    Raises:
        UserError: the folder has contents; no image is whole, or none of a class; disk full; a worker was killed.
    """
    settings = _settings(images, packing)
    with new_folder(folder) as partial:
        _go_on(partial, settings)
        shards = -(-len(images) // packing.samples_per_shard)
        done = {number for number in range(shards) if _note(partial, number).exists()}
        for number in sorted(done):
            yield _report(partial, number)
        missing = [number for number in range(shards) if number not in done]
        for outcome in _written(_Writer(images, partial, packing), missing, workers):
            if isinstance(outcome, UserError):
                raise UserError(str(outcome))
            yield _report(partial, outcome)
        _finish(partial, images, shards)


def _settings(images: Images, packing: Packing) -> dict[str, Any]:
    """What decides the bytes of shards."""
    return {"source": images.identity, "samples": len(images), **asdict(packing)}


def _written(writer: _Writer, numbers: list[int], workers: int) -> Iterator[int | UserError]:
    """The shards of these numbers as they get written."""
    loader = DataLoader(
        writer,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,  # Python 3.14's default would pickle the data
        generator=torch.Generator(),
    )
    outcomes = iter(loader)
    while True:
        try:
            outcome = next(outcomes, None)
        except RuntimeError as error:
            message = "a worker process was killed; was there enough memory? Try fewer --workers"
            raise UserError.as_transient(f"{writer.folder}: {message} ({error})") from error
        if outcome is None:
            return
        yield outcome


def _go_on(partial: Path, settings: dict[str, Any]) -> None:
    """Keep the shards of an earlier, equal attempt, and nothing else."""
    text = json.dumps(settings).encode()
    for half_written in partial.glob(".*.*"):
        half_written.unlink()
    before = next((path for name in (_SETTINGS, _OLD_SETTINGS) if (path := partial / name).exists()), None)
    if before is None or before.read_bytes() != text:
        clear(partial)
        write_whole(partial / _SETTINGS, text)


def _note(partial: Path, number: int) -> Path:
    """What is known of a shard; there only when the shard is whole."""
    return partial / f"{shard_name(number)}.done"


def _report(partial: Path, number: int) -> tuple[int, list[str]]:
    done = json.loads(_note(partial, number).read_bytes())
    return done["samples"], done["broken"]


def _finish(partial: Path, images: Images, shards: int) -> None:
    notes = [_note(partial, number) for number in range(shards)]
    done = [json.loads(note.read_bytes()) for note in notes]
    sha256 = {shard_name(number): note["sha256"] for number, note in enumerate(done) if note["sha256"]}
    if not sha256:
        raise UserError(f"{partial}: none of the {sum(n['samples'] for n in done)} images is whole")
    write_classes(partial, images.classes)
    contents = index_shards(partial, sha256)
    try:
        _check_classes(partial, images, contents.table.label)
    except UserError:  # the same command tries these images again
        for note, was in zip(notes, done, strict=True):
            if was["broken"]:
                note.unlink()
        raise
    contents.save(partial)
    if broken := [line for note in done for line in note["broken"]]:
        write_whole(partial / _LEFT_OUT, "".join(f"{line}\n" for line in broken))
    for path in [*notes, partial / _SETTINGS, partial / _OLD_SETTINGS]:
        path.unlink(missing_ok=True)


def _check_classes(partial: Path, images: Images, whole: np.ndarray) -> None:
    """Refuse shards in which a class has no image left; ``whole`` are the labels of the others."""
    if images.labels is None:
        return
    for label in np.setdiff1d(images.labels, whole).tolist():
        name = images.classes[label] if images.classes else label
        count = int((images.labels == label).sum())
        raise UserError(
            f"{partial}: none of the {count} images of class {name} is whole, so it would be missing"
        )


class _Writer(Dataset[int | UserError]):
    """Number of a shard to the same number, the shard being written by then."""

    def __init__(self, images: Images, folder: Path, packing: Packing) -> None:
        self.images, self.folder, self.packing = images, folder, packing
        self.order = np.random.Philox(key=[_SHUFFLE, 0]).random_raw(len(images)).argsort(kind="stable")

    def __getitem__(self, number: int) -> int | UserError:
        size = self.packing.samples_per_shard
        samples = self.order[number * size : (number + 1) * size].tolist()
        broken: list[str] = []
        path = self.folder / shard_name(number)
        try:
            examples = list(self._examples(samples, broken))
            if examples:
                write_shard(path, examples)
            note = {
                "samples": len(samples),
                "broken": broken,
                "sha256": sha256_of(path) if examples else None,
            }
            write_whole(_note(self.folder, number), json.dumps(note))
        except UserError as error:
            return error
        except OSError as error:
            return UserError(f"{error.filename or path}: {error.strerror}")
        return number

    def _examples(self, samples: list[int], broken: list[str]) -> Iterator[Example]:
        for sample in samples:
            item = self.images[sample]
            try:
                image, extension = encoded(item.image, self.packing)
            except BrokenImage as error:
                broken.append(f"{item.where}: {error}")
            else:
                yield f"{sample:08d}", image, extension, item.label


def encoded(image: bytes | np.ndarray, packing: Packing) -> tuple[bytes, str]:
    """The bytes to store and their extension.

    Args:
        image: encoded, or (H, W, 3) uint8.
        packing: how to store it.

    Raises:
        BrokenImage: it cannot be decoded.
    """
    pixels = image if isinstance(image, np.ndarray) else decode(image).permute(1, 2, 0).numpy()
    shorter = packing.shorter_side or min(pixels.shape[:2])
    shrink = min(pixels.shape[:2]) > shorter
    original = _FORMATS.get(Image.open(io.BytesIO(image)).format or "") if isinstance(image, bytes) else None
    if isinstance(image, bytes) and packing.encode == "keep" and original and not shrink:
        return image, original
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    if shrink:
        scale = shorter / min(picture.size)
        size = (max(shorter, round(picture.width * scale)), max(shorter, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    extension = (original or "png") if packing.encode == "keep" else packing.encode
    buffer = io.BytesIO()
    picture.save(buffer, {"jpg": "jpeg"}.get(extension, extension), quality=packing.quality)
    return buffer.getvalue(), extension
