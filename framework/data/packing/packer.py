"""A source packed into shards: in parallel, to the same bytes every time, going on where it was stopped."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from framework.data.loading.decode import BrokenImage, decode
from framework.data.packing.sources import Source
from framework.data.packing.writer import Example, clear, new_folder, shard_name, write_classes, write_shard
from framework.data.shards.index import save_contents
from framework.runtime.errors import UserError
from framework.runtime.files import sha256_of, write_whole

_FORMATS = {
    "JPEG": "jpg",
    "MPO": "jpg",  # JPEG of a camera, further pictures behind the first
    "PNG": "png",
    "WEBP": "webp",
    "PPM": "ppm",
}  # what a shard may hold, by Pillow's name
_PLAN = "plan.json"
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


def pack(source: Source, folder: Path, packing: Packing, workers: int) -> Iterator[tuple[int, list[str]]]:
    """Write the shards of ``folder``; yields the samples of each, and what is wrong with those left out.

    Samples are stored in an order mixed once and for all, so that classes are spread over shards. The folder
    appears when all are written. Stopped in between, the same call goes on after the last whole shard.

    Args:
        source: the images.
        folder: does not exist yet, or is empty.
        packing: how they are stored.
        workers: processes that write; 0 writes in this one.

    Raises:
        UserError: the folder has contents; no image is whole; disk full.
    """
    plan = {"source": source.identity, "samples": len(source), **asdict(packing)}
    with new_folder(folder) as partial:
        _go_on(partial, plan)
        shards = -(-len(source) // packing.samples_per_shard)
        done = {number for number in range(shards) if _note(partial, number).exists()}
        for number in sorted(done):
            yield _report(partial, number)
        missing = [number for number in range(shards) if number not in done]
        writer = _Writer(source, partial, packing)
        loader = DataLoader(
            writer, batch_size=None, sampler=missing, num_workers=workers, generator=torch.Generator()
        )
        for outcome in loader:
            if isinstance(outcome, UserError):
                raise UserError(str(outcome))
            yield _report(partial, outcome)
        _finish(partial, source.classes, shards)


def _go_on(partial: Path, plan: dict[str, Any]) -> None:
    """Keep the shards of an earlier, equal attempt, and nothing else."""
    text = json.dumps(plan).encode()
    path = partial / _PLAN
    for half_written in partial.glob(".*.*"):
        half_written.unlink()
    if not path.exists() or path.read_bytes() != text:
        clear(partial)
        write_whole(path, text)


def _note(partial: Path, number: int) -> Path:
    """What is known of a shard; there only when the shard is whole."""
    return partial / f"{shard_name(number)}.done"


def _report(partial: Path, number: int) -> tuple[int, list[str]]:
    done = json.loads(_note(partial, number).read_bytes())
    return done["samples"], done["broken"]


def _finish(partial: Path, classes: list[str] | None, shards: int) -> None:
    notes = [_note(partial, number) for number in range(shards)]
    done = [json.loads(note.read_bytes()) for note in notes]
    sha256 = {shard_name(number): note["sha256"] for number, note in enumerate(done) if note["sha256"]}
    if not sha256:
        raise UserError(f"{partial}: none of the {sum(n['samples'] for n in done)} images is whole")
    write_classes(partial, classes)
    save_contents(partial, sha256)
    if broken := [line for note in done for line in note["broken"]]:
        write_whole(partial / "left_out.txt", "".join(f"{line}\n" for line in broken))
    for path in [*notes, partial / _PLAN]:
        path.unlink()


class _Writer(Dataset[int | UserError]):
    """Number of a shard to the same number, the shard being written by then."""

    def __init__(self, source: Source, folder: Path, packing: Packing) -> None:
        self.source, self.folder, self.packing = source, folder, packing
        self.order = np.random.Philox(key=[_SHUFFLE, 0]).random_raw(len(source)).argsort(kind="stable")

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
            item = self.source[sample]
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
