"""Evaluation: against plain float64 references, in one process and over ranks."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from framework import engines
from framework.config.views import Views
from framework.data.loading.loader import EvalLoader
from framework.data.packing.digits import prepare_digits
from framework.data.shards.index import ShardSet
from framework.engines.base import EngineSettings
from framework.evaluation import knn
from framework.evaluation.features import evaluating, network_features, pixel_features
from framework.evaluation.knn import knn_top1
from framework.evaluation.linear_probe import linear_top1
from framework.evaluation.scoring import classifier_top1
from framework.execution import LocalNetwork
from framework.model import local_network
from framework.optim import build_optimizer
from framework.runtime import distributed
from framework.runtime.errors import UserError


@functools.cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Real features of 64 dimensions: 1437 to learn from, 360 to classify."""
    x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[rows].float(), y[rows]
    return x[:1437], y[:1437], x[1437:], y[1437:]


def knn_by_definition(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, k: int) -> float:
    """One image after the other, in float64."""
    a, b = train_x.double().numpy(), test_x.double().numpy()
    right = 0
    for x, label in zip(b, test_y.tolist(), strict=True):
        cosine = a @ x / (np.linalg.norm(a, axis=1) * np.linalg.norm(x))
        votes: dict[int, float] = {}
        for i in np.argsort(-cosine)[:k]:
            votes[int(train_y[i])] = votes.get(int(train_y[i]), 0.0) + np.exp(cosine[i] / 0.07)
        right += max(votes, key=votes.__getitem__) == label
    return 100 * right / len(b)


@pytest.mark.parametrize("k", [1, 5, 20, 200])
@pytest.mark.parametrize("noise", [0.0, 20.0])
def test_knn_equals_its_definition(k: int, noise: float) -> None:
    train_x, train_y, test_x, test_y = digits()
    train_x = train_x + noise * torch.randn(train_x.shape, generator=torch.Generator().manual_seed(k))
    expected = knn_by_definition(train_x, train_y, test_x, test_y, k)
    assert knn_top1(train_x, train_y, test_x, test_y, k) == pytest.approx(expected, abs=1e-9)
    assert (expected < 90) == (noise > 0)  # both an easy and a hard case


def test_knn_looks_at_directions_and_lets_the_nearer_outvote_the_many() -> None:
    train_x = torch.tensor([[100.0, 0.0], [0.0, 0.1], [0.1, 0.1], [0.1, 0.11]])
    train_y = torch.tensor([0, 1, 1, 1])
    test = torch.tensor([[1.0, 0.05]])
    assert knn_top1(train_x, train_y, test, torch.tensor([0]), k=4) == 100


def test_knn_in_several_pieces_counts_every_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = knn_top1(*digits(), k=5)
    monkeypatch.setattr(knn, "SIMILARITIES", 1437 * 7)
    assert knn_top1(*digits(), k=5) == whole


def test_linear_probe_separates_what_a_plane_separates_and_not_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(600, 32, generator=generator), torch.randint(3, (600,), generator=generator)
    chance = linear_top1(x[:400], y[:400], x[400:], y[400:])
    x[:, 5] += 1000 * y  # a scale on which an unstandardized probe would not converge
    assert linear_top1(x[:400], y[:400], x[400:], y[400:]) > 98
    assert 20 < chance < 47


def test_probes_of_raw_digits_reach_what_the_literature_says() -> None:
    assert 97 < knn_top1(*digits(), k=5) < 99.5
    assert 95 < linear_top1(*digits()) < 98.5


def test_bad_features_are_user_errors() -> None:
    train_x, train_y, test_x, test_y = digits()
    broken = test_x.clone()
    broken[[3, 7], 2] = float("nan")
    for probe in (knn_top1, linear_top1):
        with pytest.raises(UserError, match="2 of 360 test images are not finite"):
            probe(train_x, train_y, broken, test_y)
        with pytest.raises(UserError, match="all 1437 training images have label 4"):
            probe(train_x, torch.full_like(train_y, 4), test_x, test_y)
        with pytest.raises(UserError, match="no test images"):
            probe(train_x, train_y, test_x[:0], test_y[:0])
    with pytest.raises(UserError, match=r"evaluate.neighbors=1438: must be at most 1437"):
        knn_top1(train_x, train_y, test_x, test_y, k=1438)


@functools.cache
def network() -> LocalNetwork:
    torch.manual_seed(0)
    return local_network("resnet8", "dgl", image_size=16, num_classes=10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digits")
    prepare_digits(path)
    return path


def loader(folder: Path, batch_size: int = 50) -> EvalLoader:
    ranks = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    shards = ShardSet.open(folder / "test")
    return EvalLoader(shards, Views(), image_size=16, batch_size=batch_size, workers=0, device="cpu", **ranks)


def test_features_are_those_of_the_encoder_in_evaluation_mode(folder: Path) -> None:
    net = network().train()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    x, y = network_features(net, loader(folder))
    assert all(torch.equal(before[name], buffer) for name, buffer in net.named_buffers())
    net.eval()
    expected = torch.cat([net.features(images) for _, images, _ in loader(folder)])
    torch.testing.assert_close(x, expected)
    assert x.dtype == torch.float32
    np.testing.assert_array_equal(y.numpy(), ShardSet.open(folder / "test").labels)


def test_pixels_are_the_images(folder: Path) -> None:
    x, _ = pixel_features(loader(folder, batch_size=360))
    ((_, images, _),) = loader(folder, batch_size=360)
    assert torch.equal(x.view_as(images), images)


def test_modes_are_restored_one_by_one_even_after_an_error() -> None:
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2)))
    net.train()
    net[2].eval()
    with pytest.raises(ZeroDivisionError), evaluating(net):
        assert not any(module.training for module in net.modules())
        raise ZeroDivisionError
    assert [module.training for module in net.modules()] == [True, True, True, False, False]


def test_top1_counts_right_predictions(folder: Path) -> None:
    net = network()
    net.eval()
    right = sum(int((net.predict(images).argmax(1) == labels).sum()) for _, images, labels in loader(folder))
    assert classifier_top1(net, loader(folder)) == pytest.approx(100 * right / 360)
    assert 0 < right < 360


def test_without_labels_there_is_nothing_to_evaluate() -> None:
    batches = [(torch.arange(2), torch.zeros(2, 3, 16, 16), None)]
    with pytest.raises(UserError, match="needs labels"):
        network_features(network(), batches)
    with pytest.raises(UserError, match="needs labels"):
        classifier_top1(network(), batches)


def on_a_rank(folder: Path, sharded: bool) -> tuple[np.ndarray, np.ndarray, float]:
    net = network().train()
    if sharded:
        settings = EngineSettings(batch_size=distributed.world_size())
        net = engines.build("fsdp", net, build_optimizer, settings).whole_net()
    x, y = network_features(net, loader(folder))
    top1 = classifier_top1(net, loader(folder))
    if sharded:
        assert all(p.ndim == 1 for p in net.parameters()), "left whole"
    network.cache_clear()  # the next function on this rank gets an unsharded one
    return x.numpy(), y.numpy(), top1


@pytest.mark.parametrize(("ranks", "sharded"), [(2, False), (4, False), (2, True)])
def test_ranks_find_what_one_process_finds(pool, folder: Path, ranks: int, sharded: bool) -> None:  # type: ignore[no-untyped-def]
    expected = network_features(network().train(), loader(folder))
    (x, y, top1), *others = pool(ranks).run(on_a_rank, folder, sharded)
    np.testing.assert_allclose(x, expected[0].numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(y, expected[1].numpy())
    assert all(len(other_x) == 0 for other_x, _, _ in others)
    assert {top1, *(other for _, _, other in others)} == {classifier_top1(network(), loader(folder))}


def uneven(counts: list[int]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """``counts[r]`` images on rank r, numbered so that the ranks' numbers interleave."""
    ranks = distributed.world_size()
    for i in range(counts[distributed.rank()]):
        number = torch.tensor([i * ranks + distributed.rank()])
        yield number, number.float().view(1, 1, 1, 1).expand(1, 3, 2, 2), number % 10


def uneven_on_a_rank(counts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    x, y = pixel_features(uneven(counts))
    return x.numpy(), y.numpy()


@pytest.mark.parametrize("counts", [[3, 1], [0, 2], [2, 0]])
def test_ranks_may_hold_different_numbers_of_images(pool, counts: list[int]) -> None:  # type: ignore[no-untyped-def]
    x, y = pool(2).run(uneven_on_a_rank, counts)[0]
    numbers = sorted([2 * i for i in range(counts[0])] + [2 * i + 1 for i in range(counts[1])])
    np.testing.assert_array_equal(x, np.repeat(np.array(numbers, dtype=np.float32)[:, None], 12, axis=1))
    np.testing.assert_array_equal(y, np.array(numbers) % 10)
