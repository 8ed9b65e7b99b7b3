"""A small set of shards to be served, and loaded from afar."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from framework.config.views import Views
from framework.data.loading.loader import TrainLoader
from framework.data.packing.writer import write_shards
from framework.data.shards.index import ShardSet

PLAIN = Views(kind="none", center=1.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


GB = 10**9


def write(folder: Path, n: int = 24, per_shard: int = 4) -> ShardSet:
    """Noise of 40 x 40 pixels, about 5 kB an image."""
    images = np.random.default_rng(0).integers(0, 256, (n, 40, 40, 3), np.uint8)

    def png(i: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(images[i]).save(buffer, "png")
        return buffer.getvalue()

    write_shards(((f"{i}", png(i), "png", i % 3) for i in range(n)), folder, ["a", "b", "c"], per_shard)
    return ShardSet.open(folder)


def cached(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.tar"))


def train_loader(shards: ShardSet, **changes: object) -> TrainLoader:
    settings = {
        "image_size": 8,
        "batch_size": 4,
        "views_per_image": 1,
        "accumulation": 1,
        "rank": 0,
        "world_size": 1,
        "seed": 0,
        "workers": 0,
        "device": "cpu",
        "window": 6,
    }
    return TrainLoader(shards, PLAIN, **{**settings, **changes})
