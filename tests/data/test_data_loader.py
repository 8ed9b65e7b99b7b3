"""Loaders: one order for any number of ranks, workers and starting points; broken images."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from framework.config.views import Views
from framework.data.augment.views import augment_params, crop_view, draw_uniforms
from framework.data.batch import Batch
from framework.data.loading.decode import decode
from framework.data.loading.loader import EvalLoader, TrainLoader
from framework.data.loading.sample_order import epoch_order, eval_jobs
from framework.data.packing.digits import prepare_digits
from framework.data.packing.writer import write_shards
from framework.data.shards.index import ShardSet
from framework.runtime.errors import UserError
from tests.support.marks import slow

PLAIN = Views(kind="none", center=1.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def gray_png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 4), level).save(buffer, "png")
    return buffer.getvalue()


def numbered(
    folder: Path, n: int, broken: Collection[int] = (), labeled: bool = True, per_shard: int = 7
) -> ShardSet:
    """Image i is gray of level i, so that a batch tells which samples it holds."""
    images = [b"no image" if i in broken else gray_png(i) for i in range(n)]
    examples = [(f"{i}", image, "png", i if labeled else None) for i, image in enumerate(images)]
    write_shards(examples, folder, None, per_shard)
    return ShardSet.open(folder)


def train_loader(shards: ShardSet, views: Views = PLAIN, **changes: object) -> TrainLoader:
    settings = {
        "image_size": 4,
        "batch_size": 8,
        "views_per_image": 1,
        "accumulation": 1,
        "rank": 0,
        "world_size": 1,
        "seed": 3,
        "workers": 0,
        "device": "cpu",
    }
    return TrainLoader(shards, views, **{**settings, **changes})


def eval_loader(shards: ShardSet, views: Views = PLAIN, **changes: object) -> EvalLoader:
    settings = {"image_size": 4, "batch_size": 4, "rank": 0, "world_size": 1, "workers": 0, "device": "cpu"}
    return EvalLoader(shards, views, **{**settings, **changes})


def levels(batch: Batch) -> list[int]:
    return (batch.images[:, 0, 0, 0] * 255).round().int().tolist()


def failure(loader: TrainLoader, steps: int) -> str:
    """The error's text; an error that was kept would keep the loader's workers for as long."""
    try:
        list(loader.steps(0, steps))
    except UserError as error:
        return str(error)
    pytest.fail("no UserError")


def whole_batches(
    shards: ShardSet, world: int, accumulation: int, start: int, stop: int, **changes: object
) -> list:
    """Each step's images (V, batch, ...) and labels, put together from all ranks and micro-batches."""
    views = int(changes.get("views_per_image", 1))
    loaders = [
        train_loader(shards, rank=r, world_size=world, accumulation=accumulation, **changes)
        for r in range(world)
    ]
    result = []
    for ranks in zip(*(loader.steps(start, stop) for loader in loaders), strict=True):
        parts = [ranks[r][m] for m in range(accumulation) for r in range(world)]
        images = torch.cat([part.images.unflatten(0, (views, -1)) for part in parts], dim=1)
        result.append((images, torch.cat([part.labels for part in parts])))
    return result


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Iterator[ShardSet]:
    folder = tmp_path_factory.mktemp("digits")
    prepare_digits(folder)
    shards = ShardSet.open(folder / "train")
    yield shards
    shards.close()


def test_epoch_order_is_a_permutation_by_seed_and_epoch():
    orders = [epoch_order(1000, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for order in orders:
        assert sorted(order) == list(range(1000))
    assert len({order.tobytes() for order in orders}) == 4
    assert np.array_equal(orders[2], epoch_order(1000, 1, 0))
    assert epoch_order(8, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]  # on every machine


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_workers_and_accumulation_only_slice_the_batch(digits, world, workers, accumulation):
    settings = {"views": Views(kind="supervised"), "image_size": 12, "batch_size": 16, "views_per_image": 2}
    expected = whole_batches(digits, 1, 1, 88, 91, **settings)  # across the end of the first epoch
    found = whole_batches(digits, world, accumulation, 88, 91, workers=workers, **settings)
    assert len(found) == 3
    for (images, labels), (expected_images, expected_labels) in zip(found, expected, strict=True):
        assert torch.equal(labels, expected_labels)
        assert torch.equal(images, expected_images)


def test_color_depends_on_position_not_on_rank(digits):
    settings = {"views": Views(), "image_size": 16, "batch_size": 32, "views_per_image": 2}
    ((expected, _),) = whole_batches(digits, 1, 1, 5, 6, **settings)
    ((found, _),) = whole_batches(digits, 4, 2, 5, 6, **settings)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert not torch.equal(expected[0], expected[1])


def test_batches_are_consecutive_positions(tmp_path):
    shards = numbered(tmp_path / "a", 27)
    loader = train_loader(shards)
    assert loader.steps_per_epoch == 3
    steps = [step for (step,) in loader.steps(0, 7)]
    for step, batch in enumerate(steps):
        first = step % 3 * 8
        expected = epoch_order(27, 3, step // 3)[first : first + 8].tolist()
        assert levels(batch) == expected
        assert batch.labels.tolist() == expected
        assert batch.labels.dtype == torch.int64
        assert batch.views == 1


def test_micro_batches_and_ranks_are_slices(tmp_path):
    shards = numbered(tmp_path / "a", 20)
    order = epoch_order(20, 3, 0).tolist()
    (step,) = train_loader(shards, accumulation=2, rank=1, world_size=2).steps(1, 2)
    assert [levels(batch) for batch in step] == [order[10:12], order[14:16]]


def test_views_are_stacked_view_major(digits):
    views = Views(kind="supervised", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    ((batch,),) = train_loader(digits, views, views_per_image=2, image_size=10).steps(2, 3)
    assert (batch.views, tuple(batch.images.shape)) == (2, (16, 3, 10, 10))
    for view in range(2):
        for row in range(8):
            draw = draw_uniforms(3, 0, view, 16 + row, 1)[0]
            crop = crop_view(views, decode(digits.read(epoch_order(1437, 3, 0)[16 + row])), 10, draw)
            crop = crop.flip(-1) if augment_params(views, draw[None]).flip else crop
            assert torch.equal(batch.images[view * 8 + row], crop / 255)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_start_in_the_middle_equals_the_tail(digits, workers):
    full = [levels(batch) for (batch,) in train_loader(digits).steps(170, 182)]
    loader = train_loader(digits, workers=workers)
    state = torch.get_rng_state()
    given_up = loader.steps(0, 100)
    next(given_up)
    assert [levels(batch) for (batch,) in loader.steps(177, 182)] == full[7:]
    assert [levels(batch) for (batch,) in loader.steps(170, 171)] == full[:1]
    assert torch.equal(state, torch.get_rng_state())


def test_nothing_before_the_start_is_read(tmp_path):
    shards = numbered(tmp_path / "a", 28, per_shard=1)
    order = epoch_order(28, 3, 0).tolist()
    for sample in order[:24]:
        os.truncate(shards.folder / f"shard-{sample:06d}.tar", 0)
    ((batch,),) = train_loader(shards, batch_size=4).steps(6, 7)
    assert levels(batch) == order[24:28]
    with pytest.raises(UserError, match="became shorter"):
        list(train_loader(shards, batch_size=4).steps(5, 6))


def test_shards_without_labels_give_none(tmp_path):
    shards = numbered(tmp_path / "a", 8, labeled=False)
    ((batch,),) = train_loader(shards).steps(0, 1)
    assert batch.labels is None
    assert all(labels is None for _, _, labels in eval_loader(shards))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"batch_size": 28}, "holds 27 samples, fewer than batch_size=28"),
        (
            {"world_size": 3},
            "batch_size=8 must be a multiple of ranks (a stage's) times micro-batches (3 x 1 = 3)",
        ),
        ({"accumulation": 3, "world_size": 2}, "(2 x 3 = 6)"),
        ({"views": Views(blur=(1.0,)), "views_per_image": 2}, "views.blur=[1.0]: must be a number, or one"),
    ],
)
def test_impossible_batches_are_refused(tmp_path, changes, problem):
    shards = numbered(tmp_path / "a", 27)
    with pytest.raises(UserError, match=re.escape(problem)):
        train_loader(shards, **changes)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_gives_way_to_the_next_position(tmp_path, caplog, workers):
    order = epoch_order(24, 3, 0).tolist()
    broken = (order[3], order[11], order[12], order[23])
    shards = numbered(tmp_path / "a", 24, broken)
    loader = train_loader(shards, workers=workers)
    found = [levels(batch) for (batch,) in loader.steps(0, 3)]
    order[3], order[11], order[12], order[23] = order[4], order[13], order[13], order[0]
    assert found == [order[0:8], order[8:16], order[16:24]]
    assert loader.skipped == 4
    assert len(caplog.records) == 4
    for sample in broken:
        assert shards.where(sample) in caplog.text
    halves = [train_loader(shards, rank=rank, world_size=2).steps(1, 2) for rank in range(2)]
    assert [level for ((batch,),) in halves for level in levels(batch)] == order[8:16]


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_broken_images_stop_the_run(tmp_path, workers):
    shards = numbered(tmp_path / "a", 40, range(20))
    loader = train_loader(shards, workers=workers)
    assert re.fullmatch(r".*: 1\d of \d+ images are broken .* more than 1.0%", failure(loader, 5))
    assert len(list(train_loader(shards, max_broken=0.6).steps(0, 5))) == 5


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_broken_images_stops_the_run(tmp_path, workers):
    shards = numbered(tmp_path / "a", 9, range(9))
    message = failure(train_loader(shards, workers=workers), 1)
    assert re.fullmatch(
        r".*broken images in a row, last shard-00000\d.tar @ \d+ \(no known image format\)", message
    )


def test_a_shard_that_vanishes_stops_the_run(tmp_path):
    shards = numbered(tmp_path / "a", 14)
    (tmp_path / "a" / "shard-000001.tar").unlink()
    assert "shard-000001.tar: cannot be read" in failure(train_loader(shards, workers=1), 1)


# A worker that has failed is waited for, for five seconds.
@pytest.mark.parametrize(("passing", "workers"), [(True, 0), (False, 0), *slow([(True, 1), (False, 1)])])
def test_a_failing_disk_is_told_from_a_mistake(tmp_path, passing, workers):
    loader = train_loader(numbered(tmp_path / "a", 9, per_shard=9), workers=workers)
    shard = tmp_path / "a" / "shard-000000.tar"
    shard.unlink()
    if passing:
        shard.symlink_to("/proc/self/mem")  # nothing lies at its first bytes: EIO
    else:
        shard.mkdir()
    reason = os.strerror(errno.EIO if passing else errno.EISDIR)
    with pytest.raises(UserError, match=rf"shard-000000\.tar: cannot be read: {reason}") as caught:
        next(loader.steps(0, 1))
    assert caught.value.transient == passing


@pytest.mark.parametrize("workers", [0, *slow([2])])
def test_evaluation_sees_each_sample_once(tmp_path, workers):
    shards = numbered(tmp_path / "a", 23)
    loaders = [
        eval_loader(shards, rank=rank, world_size=3, batch_size=3, workers=workers) for rank in range(3)
    ]
    seen: list[int] = []
    for loader in loaders:
        assert len(loader) == 3
        batches = list(loader)
        assert len(batches) == 3
        for index, images, labels in batches:
            assert 0 < len(index) <= 3
            assert levels(Batch(images)) == labels.tolist() == index.tolist()
            seen += index.tolist()
    assert sorted(seen) == list(range(23))


def test_evaluation_gives_every_rank_equally_many_batches():
    for n in range(1, 40):
        for batch_size in (1, 2, 5):
            for world in range(1, min(n, 6) + 1):
                shard = np.zeros(n, np.int32)
                jobs = [eval_jobs(shard, batch_size, rank, world) for rank in range(world)]
                assert len({len(rank) for rank in jobs}) == 1
                assert all(0 < job.size <= batch_size + 1 for rank in jobs for job in rank)
                assert sorted(i for rank in jobs for job in rank for i in job.samples) == list(range(n))


def test_evaluation_takes_the_central_crop_and_leaves_broken_images_out(digits, tmp_path):
    shards = numbered(tmp_path / "a", 6, broken=(2,))
    loader = eval_loader(shards, dataclasses.replace(PLAIN, kind="simclr"))
    assert [index.tolist() for index, _, _ in loader] == [[0, 1], [3, 4, 5]]
    assert loader.skipped == 1
    _, images, _ = next(iter(eval_loader(digits, Views(kind="simclr"), image_size=12)))
    expected = crop_view(Views(kind="none"), decode(digits.read(0)), 12, draw_uniforms(0, 0, 0, 0, 1)[0])
    mean, std = torch.tensor([Views().mean, Views().std]).view(2, 3, 1, 1)
    torch.testing.assert_close(images[0], (expected / 255 - mean) / std)
    with pytest.raises(UserError, match="fewer than the 7 ranks"):
        eval_loader(shards, world_size=7)
