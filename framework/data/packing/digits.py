"""Scikit-learn's handwritten digits as shards: 1797 images of 8x8 pixels that need no download."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from framework.data.packing.writer import Example, write_shards
from framework.data.shards.index import ShardSet
from framework.runtime.errors import UserError

SIZES = {"train": 1437, "test": 360}
CLASSES = [str(digit) for digit in range(10)]


def prepare_digits(folder: Path) -> None:
    """Write the splits ``folder/train`` (1437) and ``folder/test`` (360), stratified by digit; keep those
    there.

    May run in several processes at once.

    Raises:
        UserError: a split holds something else, or cannot be written.
    """
    missing = [split for split in SIZES if not _whole(Path(folder) / split)]
    if not missing:
        return
    images, labels = load_digits(return_X_y=True)
    rows = dict(zip(SIZES, _split(labels), strict=True))
    for split in missing:
        try:
            write_shards(
                _examples(images, labels, rows[split]), Path(folder) / split, CLASSES, samples_per_shard=500
            )
        except UserError:
            if not _whole(Path(folder) / split):  # else another process was quicker
                raise


def _whole(folder: Path) -> bool:
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if len(shards := ShardSet.open(folder)) != (expected := SIZES[folder.name]) or shards.classes != CLASSES:
        raise UserError(
            f"{folder}: holds {len(shards)} samples, not the {expected} digits that data.prepare=digits packs; set "
            f"data.prepare=none to train on your own shards, or name another data.path for the digits"
        )
    return True


def _split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    train, test = train_test_split(
        np.arange(len(labels)), test_size=SIZES["test"], stratify=labels, random_state=0
    )
    return np.sort(train), np.sort(test)


def _examples(images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> Iterator[Example]:
    for row in rows:
        pixels = np.rint(images[row].reshape(8, 8) * (255 / 16)).astype(np.uint8)  # gray levels are 0 to 16
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="png")
        yield f"{row:06d}", buffer.getvalue(), "png", int(labels[row])
