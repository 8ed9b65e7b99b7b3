"""Mixup, CutMix and RandAugment against timm's own, and as functions of an image's place alone."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor

from framework.config.mixing import Mixing
from framework.config.views import Views
from framework.data.augment.drawing import generators_kept, seed_generators
from framework.data.augment.mixing import Mixer
from framework.data.augment.views import augment_params, crop_view, draw_uniforms
from framework.data.batch import Batch
from framework.data.loading.loader import TrainLoader
from framework.data.packing.writer import write_shards
from framework.data.shards.index import ShardSet
from framework.runtime.errors import UserError
from tests.support.marks import slow

BOTH, CLASSES, SIDE = Mixing(mixup=0.8, cutmix=1.0), 7, 12
PAIRS = Mixing(mixup=0.8, cutmix=1.0, probability=0.9, mode="pair")
CIFAR = Views(kind="cifar", pad=1, rand_augment="rand-m9-mstd0.5-inc1")


def some(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, 3, SIDE, SIDE, generator=generator)
    return images, torch.randint(CLASSES, (n,), generator=generator)


def mixed(mixing: Mixing, n: int, step: int = 0) -> tuple[Tensor, Tensor]:
    images, labels = some(n)
    return Mixer(mixing, CLASSES, 5).mixed(images.clone(), labels, step, step)


def timms(mixing: Mixing) -> Mixup:
    return Mixup(
        mixing.mixup, mixing.cutmix, None, mixing.probability, mixing.switch, "batch", True, 0.0, CLASSES
    )


@pytest.mark.parametrize("step", range(0, 96, 16))
def test_a_batch_is_timms_with_neighbors_as_partners(step: int) -> None:
    images, labels = some(8)
    order = [0, 2, 4, 6, 7, 5, 3, 1]  # timm mixes the first with the last
    with generators_kept():
        seed_generators(5, 2, step)
        expected, targets = timms(BOTH)(images[order], labels[order])
    ours, ours_targets = mixed(BOTH, 8, step)
    assert torch.equal(ours[order], expected) and torch.equal(ours_targets[order], targets)


def test_every_pair_is_timms_batch_of_two() -> None:
    images, labels = some(40)
    ours, targets = mixed(PAIRS, 40)
    for row in range(0, 40, 2):
        pair = slice(row, row + 2)
        with generators_kept():
            seed_generators(5, 2, row)
            expected, target = timms(PAIRS)(images[pair].clone(), labels[pair])
        assert torch.equal(ours[pair], expected) and torch.equal(targets[pair], target)


def test_images_and_labels_have_the_same_share_of_their_partners() -> None:
    """Lambda is read from what the images became: by pixels for CutMix, by a ratio for Mixup."""
    images, labels = some(400)
    partners = images.view(200, 2, 3, SIDE, SIDE).flip(1).flatten(0, 1)
    ours, targets = mixed(PAIRS, 400)
    kinds = {"mixup": 0, "cutmix": 0, "neither": 0}
    for image, partner, label, other, found, target in zip(
        images, partners, labels, labels.view(200, 2).flip(1).flatten(), ours, targets, strict=True
    ):
        stayed = (found == image).all(0)
        if bool((stayed | (found == partner).all(0)).all()):
            share = float(stayed.float().mean())
            kinds["neither" if share == 1 else "cutmix"] += 1
        else:
            share = float(((found - partner) / (image - partner)).median())
            assert torch.allclose(found, share * image + (1 - share) * partner, atol=1e-4)
            kinds["mixup"] += 1
        wanted = torch.zeros(CLASSES)
        wanted[label] += share
        wanted[other] += 1 - share
        assert torch.allclose(target, wanted, atol=1e-4)
    # Of 200 pairs, 90 % are mixed, half by each.
    assert 100 < kinds["mixup"] < 260 and 100 < kinds["cutmix"] < 260 and 4 <= kinds["neither"] < 90


def test_the_global_generators_go_on_as_if_nothing_had_been_drawn() -> None:
    np.random.seed(1)
    random.seed(1)
    expected = np.random.rand(), random.random()
    np.random.seed(1)
    random.seed(1)
    mixed(PAIRS, 4)
    crop_view(CIFAR, torch.zeros(3, 8, 8, dtype=torch.uint8), 8, draw_uniforms(0, 0, 0, 0, 1)[0])
    assert (np.random.rand(), random.random()) == expected


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShardSet]:
    """60 images of noise: two steps of 24 an epoch."""
    folder, generator = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    examples = []
    for number in range(60):
        buffer = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (9, 8, 3), np.uint8)).save(buffer, "png")
        examples.append((f"{number}", buffer.getvalue(), "png", number % 10))
    write_shards(examples, folder, None, 60)
    found = ShardSet.open(folder)
    yield found
    found.close()


def loader(shards: ShardSet, mixing: Mixing, **changes: int) -> TrainLoader:
    ranks = {"accumulation": 1, "rank": 0, "world_size": 1, "batch_size": 24, "workers": 0} | changes
    mixer = Mixer(mixing, 10, 3) if mixing.key else None
    return TrainLoader(
        shards, CIFAR, image_size=8, views_per_image=1, seed=3, device="cpu", mixer=mixer, **ranks
    )


def whole(parts: list[Batch]) -> tuple[Tensor, Tensor]:
    return torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts])


@pytest.mark.parametrize("mixing", [PAIRS, *slow([BOTH])], ids=lambda mixing: mixing.mode)
def test_ranks_micro_batches_workers_and_starts_make_the_same_of_an_image(
    shards: ShardSet, mixing: Mixing
) -> None:
    """Also beyond the end of an epoch."""
    steps = [whole(batches) for batches in loader(shards, mixing).steps(0, 3)]
    ranks = [loader(shards, mixing, accumulation=3, rank=rank, world_size=2, workers=rank) for rank in (0, 1)]
    together = zip(*(one.steps(1, 3) for one in ranks), strict=True)
    for expected, (first, second) in zip(steps[1:], together, strict=True):
        parts = whole([part for pair in zip(first, second, strict=True) for part in pair])
        assert all(torch.equal(a, b) for a, b in zip(expected, parts, strict=True))
    assert not torch.equal(steps[0][1], steps[1][1])
    plain = next(iter(loader(shards, Mixing()).steps(0, 1)))[0]
    assert torch.equal(mixup_target(plain.labels, 10).argmax(1), plain.labels)
    share = steps[0][1].gather(1, plain.labels[:, None])
    assert steps[0][1].shape == (24, 10) and torch.allclose(steps[0][1].sum(1), torch.ones(24))
    assert bool((share > 0).all())


def test_a_rank_needs_whole_pairs(shards: ShardSet) -> None:
    with pytest.raises(UserError, match=r"batch_size=18: mixing .* has 9; must be a multiple of 4"):
        loader(shards, BOTH, batch_size=18, world_size=2)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m10-n3-p1.0-inc1", "rand-m7-tweights"])
def test_rand_augment_is_timms_behind_crop_and_flip(policy: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    plain, views = Views(kind="supervised"), Views(kind="supervised", rand_augment=policy)
    settings = {
        "translate_const": 10,
        "img_mean": (124, 116, 104),
        "interpolation": Image.Resampling.BICUBIC,
    }
    transform, changed = rand_augment_transform(policy, settings), 0
    for draw in draw_uniforms(0, 0, 0, 0, 40):
        flipped = bool(augment_params(plain, draw[None]).flip)
        assert not bool(augment_params(views, draw[None]).flip)  # it is done
        crop = crop_view(plain, image, 24, draw)
        crop = crop.flip(-1) if flipped else crop
        with generators_kept():
            seed_generators(int(draw[54] * 2**53))
            try:
                expected = np.array(transform(Image.fromarray(crop.permute(1, 2, 0).numpy())))
            except ValueError as error:  # timm asks Pillow for colors of 0 bits, which are black
                assert "bits must be" in str(error)
                crop_view(views, image, 24, draw)
                continue
        found = crop_view(views, image, 24, draw)
        assert torch.equal(found, torch.from_numpy(expected).permute(2, 0, 1))
        changed += not torch.equal(found, crop)
    assert changed > 20


@pytest.mark.parametrize(
    "policy", ["m9", "rand-m9.5", "rand-x3", "rand-n0", "rand-tnothing", "rand-m9-mstd", ""]
)
def test_a_policy_that_timm_would_misread_is_refused(policy: str) -> None:
    with pytest.raises(ValueError, match="must be of timm's form"):
        Views(rand_augment=policy)
