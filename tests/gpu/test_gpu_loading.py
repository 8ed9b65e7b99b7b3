"""Views and batches that a GPU finishes, beside those of the CPU."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from framework.config.views import Views
from framework.data.augment.crops import resized_batch, shifted_batch
from framework.data.augment.views import augment_params, draw_uniforms, finish_views
from framework.data.batch import Batch
from framework.data.loading.loader import EvalLoader, TrainLoader
from framework.data.loading.prefetch import finished
from framework.data.packing.writer import write_shards
from framework.data.shards.index import ShardSet

pytestmark = pytest.mark.gpu

CPU = torch.device("cpu")
KINDS = {
    "simclr": Views(solarize=0.3),
    "supervised": Views(kind="supervised"),
    "cifar": Views(kind="cifar"),
    "none": Views(kind="none"),
}
#: a gray level, after the division by the smallest standard deviation
LEVEL = 1 / 255 / 0.224


@pytest.mark.parametrize("kind", KINDS)
def test_views_are_finished_alike(device: torch.device, no_tf32: None, kind: str) -> None:
    """Flip, jitter, grayscale, blur, solarization. A value at the edge of solarization may fall to either side."""
    pixels = torch.randint(
        256, (64, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    params = augment_params(KINDS[kind], draw_uniforms(0, 0, 0, 0, len(pixels)))
    expected = finish_views(KINDS[kind], pixels, params, CPU)
    found = finish_views(KINDS[kind], pixels, params, device)
    assert found.device.type == device.type
    difference = (found.cpu() - expected).abs()
    assert (difference > 1e-3).float().mean() < 1e-3


def test_crops_are_cut_alike(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (32, 3, 40, 40), dtype=torch.uint8, generator=generator)
    corner = torch.randint(0, 16, (32, 2), generator=generator)
    boxes = torch.cat([corner, corner + torch.randint(8, 24, (32, 2), generator=generator)], 1)
    for size in (16, 40, 56):
        cut = resized_batch(images.to(device), boxes.to(device), size).cpu().int()
        difference = (cut - resized_batch(images, boxes, size).int()).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 0.01
    shift = torch.randint(-4, 5, (32, 2), generator=generator)
    boxes = torch.cat([shift, shift + 40], 1)
    for edge in ("reflect", "zeros"):
        assert torch.equal(
            shifted_batch(images.to(device), boxes.to(device), edge).cpu(), shifted_batch(images, boxes, edge)
        )


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """96 smooth images of 20 x 20 pixels."""
    folder = tmp_path_factory.mktemp("gpu") / "train"
    coarse = np.random.default_rng(0).integers(0, 256, (96, 5, 5, 3), np.uint8)
    images = [Image.fromarray(image).resize((20, 20), Image.Resampling.BICUBIC) for image in coarse]
    write_shards(((f"{i}", png(image), "png", i % 4) for i, image in enumerate(images)), folder, None)
    return ShardSet.open(folder)


def batches(
    shards: ShardSet, device: torch.device, kind: str, in_memory: bool, workers: int
) -> Iterator[Batch]:
    loader = TrainLoader(
        shards,
        KINDS[kind],
        image_size=20,
        batch_size=16,
        views_per_image=2,
        accumulation=2,
        rank=0,
        world_size=1,
        seed=3,
        workers=workers,
        device=device,
        in_memory=in_memory,
    )
    return itertools.chain.from_iterable(loader.steps(1, 12))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("in_memory", [False, True], ids=["from shards", "cache=memory"])
@pytest.mark.parametrize("kind", ["simclr", "cifar"])
def test_batches_are_the_cpus(
    device: torch.device, no_tf32: None, shards: ShardSet, kind: str, in_memory: bool, workers: int
) -> None:
    """Over two epochs, while the GPU is kept busy with something else: what is late would be seen.

    Where a value is rounded to another gray level, the jitter of colors makes that some levels.
    """
    busy = torch.randn(1024, 1024, device=device) if device.type == "cuda" else None
    found = []
    for batch in batches(shards, device, kind, in_memory, workers):
        if busy is not None:
            for _ in range(20):
                busy = (busy @ busy).div_(1e3)
        found.append((batch.images * 1, batch.labels))
    expected = list(batches(shards, CPU, kind, in_memory, 0))
    assert len(found) == len(expected) == 22
    for (images, labels), batch in zip(found, expected, strict=True):
        assert images.device.type == device.type and labels is not None and batch.labels is not None
        assert torch.equal(labels.cpu(), batch.labels)
        difference = (images.cpu() - batch.images).abs()
        assert difference.max() < 10 * LEVEL and (difference > 1e-3).float().mean() < 0.01


def test_evaluation_sees_every_image_once(device: torch.device, shards: ShardSet) -> None:
    def seen(where: torch.device) -> list[tuple[torch.Tensor, ...]]:
        loader = EvalLoader(
            shards,
            Views(),
            image_size=16,
            batch_size=40,
            rank=0,
            world_size=1,
            workers=2,
            device=where,
        )
        return [tuple(part.cpu() for part in parts if part is not None) for parts in loader]

    found, expected = seen(device), seen(CPU)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[2], theirs[2])
        assert torch.allclose(ours[1], theirs[1], atol=1e-4)
    assert torch.cat([numbers for numbers, *_ in found]).sort().values.tolist() == list(range(96))


def test_the_side_stream_gives_away_no_memory_in_use(gpu: torch.device) -> None:
    """Each item is read long after it was handed over and dropped, while the next ones are made beside it."""
    pinned = [torch.full((2**22,), float(number)).pin_memory() for number in range(40)]
    work = torch.randn(2048, 2048, device=gpu)
    sums = []
    for _, images in finished(pinned, lambda item: item.to(gpu, non_blocking=True) + 1, gpu):
        for _ in range(10):
            work = (work @ work).div_(1e3)
        sums.append(images.double().mean())
        del images
    assert torch.stack(sums).tolist() == [number + 1.0 for number in range(40)]
