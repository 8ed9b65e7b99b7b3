"""Probes, CKA, t-SNE, feature maps: against plain float64 references, and what bad input says."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.datasets import load_digits
from torch import Tensor

from framework.analysis.cka import MinibatchCKA, run_cka
from framework.analysis.embedding import embed
from framework.analysis.feature_maps import activation_maps, breadth
from framework.analysis.memory_tables import PUBLISHED, published_recipe, stage_shares
from framework.analysis.probes import probe_layers
from framework.data.loading.sample_order import balanced
from framework.evaluation.features import segment_outputs
from framework.evaluation.linear_probe import linear_probe, linear_top1
from framework.evaluation.run_folder import Run, check_comparable, open_runs
from framework.runtime.errors import UserError


def hsic_by_definition(x: np.ndarray, y: np.ndarray) -> float:
    """The U-statistic itself: a mean over all ordered quadruples of different images (Song et al. 2012)."""
    k, m = x @ x.T, y @ y.T
    terms = [k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in permutations(range(len(x)), 4)]
    return float(np.mean(terms))


def random_layers(seed: int, count: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    common = generator.standard_normal((8, 5))
    return [
        np.maximum(common @ generator.standard_normal((5, w)), 0.1 * i)
        for i, w in enumerate([7, 3, 12][:count])
    ]


def test_cka_equals_its_definition_over_batches() -> None:
    cka = MinibatchCKA()
    batches = [(random_layers(2 * s, 3), random_layers(2 * s, 2)[::-1]) for s in range(3)]
    batches.append((random_layers(10, 3), random_layers(11, 2)))
    for a, b in batches:
        cka.add(*([torch.from_numpy(x).float().view(8, -1, 1) for x in layers] for layers in (a, b)))
    for i in range(3):
        for j in range(2):
            ab, aa, bb = (
                sum(hsic_by_definition(batch[s][p], batch[t][q]) for batch in batches)
                for s, p, t, q in ((0, i, 1, j), (0, i, 0, i), (1, j, 1, j))
            )
            assert float(cka.matrix()[i, j]) == pytest.approx(ab / np.sqrt(aa * bb), abs=1e-6)


def test_cka_ignores_rotation_and_scale_but_not_the_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 10, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(10, 10, generator=generator, dtype=torch.float64)).Q
    other = torch.randn(60, 10, generator=generator, dtype=torch.float64)
    cka = MinibatchCKA()
    cka.add([x], [3 * x @ rotation + 5, other, torch.ones_like(x)])
    same, unrelated, constant = cka.matrix()[0].tolist()
    assert same == pytest.approx(1, abs=1e-9)
    assert abs(unrelated) < 0.1
    assert np.isnan(constant) or abs(constant) < 1e-3


def test_linear_probe_is_the_optimum_of_its_objective() -> None:
    """Softmax regression by another optimizer on the objective as written down, in float64."""
    x, y = load_digits(return_X_y=True)
    x, y = x[:300, 10:26], y[:300] % 4
    z = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights, bias = flat[:64].reshape(4, 16), flat[64:]
        logits = z @ weights.T + bias
        logits -= logits.max(1, keepdims=True)
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        error = p - np.eye(4)[y]
        loss = -0.1 * np.log(p[np.arange(300), y]).sum() + 0.5 * (weights**2).sum()
        return loss, np.concatenate([(0.1 * error.T @ z + weights).ravel(), 0.1 * error.sum(0)])

    best = minimize(
        objective, np.zeros(68), jac=True, method="BFGS", options={"gtol": 1e-10, "maxiter": 5000}
    ).x
    logits = z @ best[:64].reshape(4, 16).T + best[64:]
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    probe = linear_probe(torch.from_numpy(x).float(), torch.from_numpy(y))
    np.testing.assert_allclose(probe.predict_proba(x), expected, atol=1e-6)


def test_layer_probes_are_probes_of_the_encoder_up_to_there(both_runs: tuple[Path, Path]) -> None:
    run = Run.open(both_runs[0])
    done: list[None] = []
    found = probe_layers(run, run, images=200, flatten=False, on_segment=lambda: done.append(None))
    assert list(found) == ["layer1", "layer2", "layer3"] and len(done) == 3
    assert len(set(found.values())) > 1
    net = run.encoder()
    splits = run.splits
    rows = []
    for shards in (splits.train.subsample(200), splits.test.subsample(200)):
        x = torch.cat(
            [
                net.backbone.layer1(stem(net, images)).mean((2, 3))
                for _, images, _ in splits.eval_loader(shards)
            ]
        )
        rows += [x, torch.from_numpy(shards.labels)]
    assert found["layer1"] == linear_top1(*rows)


def stem(net: torch.nn.Module, images: Tensor) -> Tensor:
    backbone = net.backbone
    return backbone.act1(backbone.bn1(backbone.conv1(images)))  # type: ignore[operator,union-attr]


def test_a_run_is_like_itself_and_less_like_another(both_runs: tuple[Path, Path]) -> None:
    loco, gim = open_runs(both_runs)
    itself, other = run_cka(loco, loco), run_cka(loco, gim)
    assert itself.shape == other.shape == (3, 3)
    torch.testing.assert_close(itself.diagonal(), torch.ones(3, dtype=torch.float64))
    assert float(other.diagonal()[-1]) < 0.999


def test_the_encoder_is_the_checkpoint_and_the_untrained_one_is_not(both_runs: tuple[Path, Path]) -> None:
    run = Run.open(both_runs[0])
    trained, untrained, alone = run.encoder(), run.encoder(trained=False), run.backbone()
    for name, weight in run.weights().items():
        assert torch.equal(trained.backbone.state_dict()[name], weight)
        assert torch.equal(alone.state_dict()[name], weight)
    assert not torch.equal(untrained.backbone.state_dict()["conv1.weight"], run.weights()["conv1.weight"])
    images = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(trained.features(images), alone(images))


def test_the_encoder_needs_no_compiler_and_no_download(both_runs: tuple[Path, Path]) -> None:
    run = Run.open(both_runs[0], ["execution.compile=true", "network.args={pretrained: true}"])
    net = run.encoder(trained=False)
    assert net.program.runners == net.segments


def test_feature_maps_are_mean_absolute_activations(both_runs: tuple[Path, Path]) -> None:
    runs = open_runs(both_runs)
    name, images, values = activation_maps(runs, "layer2", [5, 0])
    assert name == "layer2" and values.shape == (2, 2, 4, 4)
    splits = runs[0].splits
    ((_, batch, _),) = splits.eval_loader(splits.test.take(np.array([0, 5])))
    net = runs[1].encoder()
    expected = segment_outputs(net, runs[1].segments(net), batch)[1].abs().mean(1)
    torch.testing.assert_close(values[1], expected.flip(0))
    torch.testing.assert_close(images, (batch.flip(0) * 0.5 + 0.5))
    one_spot = torch.zeros(1, 1, 4, 4)
    one_spot[..., 1, 2] = 3
    assert breadth(one_spot) == [[1 / 16]]


def test_tsne_shows_the_chosen_classes(both_runs: tuple[Path, Path]) -> None:
    points = embed(Run.open(both_runs[0]), [3, 8], 20, perplexity=5, umap=False, seed=0)
    assert points.xy.shape == (40, 2) and np.isfinite(points.xy).all()
    assert np.bincount(points.label).tolist() == [0, 0, 0, 20, 0, 0, 0, 0, 20]
    assert -1 < points.silhouette < 1


def test_bad_input_is_one_clear_line(both_runs: tuple[Path, Path], tmp_path: Path) -> None:
    run = Run.open(both_runs[0])
    with pytest.raises(UserError, match=r"class 11 has no images in .*test: its labels go up to 9"):
        embed(run, [0, 11], 5, perplexity=2, umap=False, seed=0)
    with pytest.raises(UserError, match="20 images are too few for a perplexity of 30"):
        embed(run, [0], 20, perplexity=30, umap=False, seed=0)
    with pytest.raises(UserError, match="at least 4 images, and has 1"):
        run_cka(run, run, images=1)
    with pytest.raises(UserError, match=r"all 1 training images have label .*: one class only"):
        probe_layers(run, run, images=1, flatten=False, on_segment=lambda: None)
    with pytest.raises(UserError, match=r"image 360: .*images 0 to 359"):
        activation_maps([run], None, [360])
    with pytest.raises(
        UserError, match=r"--segment layer9: the network has layer1, layer2, layer3, layer1.0"
    ):
        activation_maps([run], "layer9", [0])
    with pytest.raises(UserError, match="no run folder"):
        Run.open(tmp_path)
    with pytest.raises(UserError, match="named twice"):
        open_runs([both_runs[0], both_runs[0]])


def test_runs_of_different_networks_or_images_are_not_compared(both_runs: tuple[Path, Path]) -> None:
    loco, gim = open_runs(both_runs)
    check_comparable([loco, gim])
    larger = Run.open(both_runs[1], ["network.name=resnet14"])
    with pytest.raises(UserError, match=r"same network.name: .*loco has resnet8, .*gim resnet14"):
        run_cka(loco, larger)
    with pytest.raises(UserError, match="does not fit resnet14: Missing key"):
        larger.encoder()
    with pytest.raises(UserError, match=r"same images: .*8 px.*16 px"):
        check_comparable([loco, Run.open(both_runs[1], ["data.image_size=16"])])


def test_a_missing_checkpoint_is_named(both_runs: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text((both_runs[0] / "recipe.yaml").read_text())
    with pytest.raises(UserError, match="has no checkpoint yet"):
        Run.open(tmp_path).encoder()


@pytest.mark.parametrize("share", [0.01, 0.1, 1 / 3, 1.0])
def test_a_share_of_the_labels_is_even_over_classes_and_nested(share: float) -> None:
    labels = np.random.default_rng(0).choice(5, size=1000, p=[0.5, 0.2, 0.2, 0.098, 0.002])
    chosen = balanced(labels, share, seed=3)
    counts = np.bincount(labels, minlength=5)
    assert np.bincount(labels[chosen], minlength=5).tolist() == [max(1, round(share * c)) for c in counts]
    assert (np.diff(chosen) > 0).all()
    assert set(balanced(labels, share / 2, seed=3)) <= set(chosen)
    assert share == 1 or set(balanced(labels, share, seed=4)) != set(chosen)


@pytest.mark.slow
def test_counted_shares_are_near_loco_table_6() -> None:
    memory, flops = stage_shares(published_recipe("loco_r50_100ep"))
    np.testing.assert_allclose(flops, [19.39, 25.09, 35.80, 19.73], atol=0.2)
    np.testing.assert_allclose(memory, [43.64, 29.09, 21.82, 5.45], atol=5)


def test_published_rows_name_recipes_that_exist() -> None:
    for row in PUBLISHED:
        assert published_recipe(row.recipe).method.name == row.method.lower()
