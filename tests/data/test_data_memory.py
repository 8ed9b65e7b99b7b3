"""Images kept decoded: the same batches as from the shards."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from framework.config.views import Views
from framework.data.loading.loader import TrainLoader
from framework.data.packing.writer import write_shards
from framework.data.shards.index import ShardSet
from framework.runtime.errors import UserError


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    """Smooth 20 x 20 images; number 7 is broken."""
    folder = tmp_path_factory.mktemp("memory") / "train"
    coarse = np.random.default_rng(0).integers(0, 256, (40, 5, 5, 3), np.uint8)
    images = [
        np.asarray(Image.fromarray(image).resize((20, 20), Image.Resampling.BICUBIC)) for image in coarse
    ]
    data = [b"broken" if i == 7 else png(image) for i, image in enumerate(images)]
    write_shards(((f"{i}", image, "png", i % 4) for i, image in enumerate(data)), folder, None, 9)
    return ShardSet.open(folder)


def loader(shards: ShardSet, views: Views, size: int, in_memory: bool, **changes: object) -> TrainLoader:
    settings = {
        "image_size": size,
        "batch_size": 8,
        "views_per_image": 2,
        "accumulation": 1,
        "rank": 0,
        "world_size": 1,
        "seed": 5,
        "workers": 0,
        "device": "cpu",
        **changes,
    }
    return TrainLoader(shards, views, in_memory=in_memory, **settings)


@pytest.mark.parametrize("workers", [0, 2])
def test_shifted_crops_are_equal_to_the_bit(shards, workers):
    views = Views(kind="cifar", pad=3)
    expected = list(loader(shards, views, 20, False).steps(2, 9))
    found = list(loader(shards, views, 20, True, workers=workers).steps(2, 9))
    for (batch,), (other,) in zip(found, expected, strict=True):
        assert torch.equal(batch.images, other.images)
        assert torch.equal(batch.labels, other.labels)


@pytest.mark.parametrize("size", [12, 20, 24])
def test_resized_crops_differ_by_rounding(shards, size):
    views = Views(kind="supervised", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    for (batch,), (other,) in zip(
        loader(shards, views, size, True).steps(0, 5),
        loader(shards, views, size, False).steps(0, 5),
        strict=True,
    ):
        assert torch.equal(batch.labels, other.labels)
        difference = (255 * (batch.images - other.images)).abs().round()
        assert difference.max() <= 2
        assert (difference > 0).float().mean() < 0.1


def test_ranks_share_the_batches(shards):
    views = Views(kind="simclr", blur=0.0)
    ((whole,),) = loader(shards, views, 16, True).steps(1, 2)
    parts = [
        next(loader(shards, views, 16, True, rank=rank, world_size=2).steps(1, 2))[0] for rank in range(2)
    ]
    images = torch.cat([part.images.unflatten(0, (2, -1)) for part in parts], 1).flatten(0, 1)
    torch.testing.assert_close(images, whole.images, atol=1e-5, rtol=0)


def test_broken_images_are_counted_as_from_the_shards(shards, caplog):
    counts = []
    for in_memory in (False, True):
        run = loader(shards, Views(kind="supervised"), 16, in_memory)
        list(run.steps(0, 5))
        counts.append(run.skipped)
    assert counts == [1, 1]
    assert caplog.text.count(shards.where(7)) == 2


def test_sets_that_do_not_suit_are_refused(shards, tmp_path):
    with pytest.raises(UserError, match="cifar views of 16 pixels need images of that size"):
        loader(shards, Views(kind="cifar"), 16, True)
    images = [np.zeros((8, 8 + i % 2, 3), np.uint8) for i in range(10)]
    write_shards(((f"{i}", png(image), "png", 0) for i, image in enumerate(images)), tmp_path / "a", None)
    with pytest.raises(UserError, match=r"shard-000000\.tar @ \d+ is 9x8 and others are 8x8"):
        loader(ShardSet.open(tmp_path / "a"), Views(), 8, True)
    write_shards(((f"{i}", b"x", "png", 0) for i in range(10)), tmp_path / "b", None)
    with pytest.raises(UserError, match="all 10 images are broken"):
        loader(ShardSet.open(tmp_path / "b"), Views(), 8, True)
