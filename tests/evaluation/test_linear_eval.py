"""Linear evaluation: schedule, equality with a plain reference, ranks, resuming, bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from framework.data.loading.sample_order import epoch_order
from framework.evaluation import linear_classifier
from framework.evaluation.cached_features import cached_features
from framework.evaluation.linear_classifier import Rows, State, accuracy, evaluate_rows, fit
from framework.evaluation.linear_eval import train_loader
from framework.evaluation.linear_protocols import PROTOCOLS, Protocol
from framework.evaluation.run_folder import Run
from framework.runtime import distributed
from framework.runtime.errors import UserError
from framework.runtime.exit_status import EXIT_USAGE
from framework.runtime.run_lock import take
from framework.tracking.metric_log import read_log
from tests.support.forked import forked_tool
from tests.support.pool import Pool

SHORT = Protocol(lr=0.5, momentum=0.9, nesterov=True, epochs=4, batch_size=64, drops=(2, 3))


def rows(dtype: torch.dtype = torch.float64) -> Rows:
    x, y = load_digits(return_X_y=True)
    return Rows(torch.from_numpy(x / 16).to(dtype), torch.from_numpy(y))


def by_definition(
    protocol: Protocol, x: np.ndarray, y: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Softmax regression by SGD as it stands in the textbook, in float64."""
    start = (
        0.01 * torch.randn(10, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    )
    weights = np.concatenate([start, np.zeros((10, 1))], axis=1)
    momentum, per_epoch = np.zeros_like(weights), len(x) // protocol.batch_size
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    for epoch in range(protocol.epochs):
        order = epoch_order(len(x), seed, epoch)
        rate = protocol.lr * protocol.batch_size / 256 / 10 ** sum(epoch >= drop for drop in protocol.drops)
        for k in range(per_epoch):
            rows = order[k * protocol.batch_size : (k + 1) * protocol.batch_size]
            p = np.exp(x[rows] @ weights.T)
            p /= p.sum(1, keepdims=True)
            gradient = (p - np.eye(10)[y[rows]]).T @ x[rows] / len(rows)
            momentum = protocol.momentum * momentum + gradient
            weights -= rate * (gradient + protocol.momentum * momentum if protocol.nesterov else momentum)
    return weights[:, :-1], weights[:, -1]


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_classifier_is_that_of_the_textbook(nesterov: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    protocol = Protocol(**{**SHORT.__dict__, "nesterov": nesterov})
    x, y = rows()
    found = fit(lambda start: Rows(x, y).batches(start, protocol, 5), 28, (64, 10), protocol, like=x)
    weights, bias = by_definition(protocol, x.numpy(), y.numpy(), seed=5)
    np.testing.assert_allclose(found.weight.detach().numpy(), weights, atol=1e-6)
    np.testing.assert_allclose(found.bias.detach().numpy(), bias, atol=1e-6)
    right = (
        (np.argsort(-(x.numpy() @ weights.T + bias), axis=1)[:, :5] == y.numpy()[:, None]).cumsum(1).mean(0)
    )
    monkeypatch.setattr(linear_classifier, "AT_ONCE", 1000)
    assert accuracy(found, Rows(x, y)) == pytest.approx({"top1": 100 * right[0], "top5": 100 * right[4]})
    assert 80 < 100 * right[0] < 99


def test_schedules_are_those_of_the_papers() -> None:
    loco, moco, simclr = (PROTOCOLS[name] for name in ("loco", "moco", "simclr"))
    rates = [loco.learning_rate(10 * e, 10) for e in (0, 29, 30, 60, 90, 99)]
    assert rates == pytest.approx([30, 30, 3, 0.3, 0.03, 0.03])
    assert [moco.learning_rate(10 * e, 10) for e in (59, 60, 80)] == pytest.approx([30, 3, 0.3])
    assert simclr.learning_rate(0, 10) == pytest.approx(1.6)
    assert simclr.learning_rate(450, 10) == pytest.approx(0.8)
    assert (loco.momentum, moco.momentum, simclr.momentum, simclr.nesterov) == (0, 0.9, 0.9, True)
    assert (loco.epochs, moco.epochs, simclr.epochs) == (100, 100, 90)


class Interrupted(Exception):
    """Stands for a kill."""


def test_a_fit_goes_on_after_its_last_whole_epoch(tmp_path: Path) -> None:
    x, y = rows()
    drawn: list[int] = []

    def batches(start: int):  # type: ignore[no-untyped-def]
        drawn.append(start)
        return Rows(x, y).batches(start, SHORT, 0)

    def stop(epoch: int, loss: float) -> None:
        if epoch == 2:
            raise Interrupted

    undisturbed = fit(batches, 28, (64, 10), SHORT, like=x)
    state = State(tmp_path / "state.safetensors", {"lr": 1})
    with pytest.raises(Interrupted):
        fit(batches, 28, (64, 10), SHORT, like=x, state=state, on_epoch=stop)
    resumed = fit(batches, 28, (64, 10), SHORT, like=x, state=state)
    assert drawn == [0, 0, 2 * 28]
    assert torch.equal(resumed.weight, undisturbed.weight) and torch.equal(resumed.bias, undisturbed.bias)
    assert State(tmp_path / "state.safetensors", {"lr": 2}).load() == (0, {}), "of other settings"


def test_bad_settings_are_one_line() -> None:
    x, y = rows()
    with pytest.raises(UserError, match="--batch-size 4096: more than the 1797 training images"):
        evaluate_rows(Rows(x, y), Rows(x, y), 10, PROTOCOLS["simclr"], 0)
    wild = Protocol(lr=1e300, momentum=0.9, nesterov=False, epochs=3, batch_size=256)
    with pytest.raises(UserError, match=r"loss is (nan|inf) in epoch .: lower --lr"):
        evaluate_rows(Rows(x, y), Rows(x, y), 10, wild, 0)


def on_a_rank(folder: str) -> tuple[np.ndarray, dict[str, float], int]:
    """A fit on this rank's half of every batch, and what ranks together say of it."""
    x, y = rows()

    def halves(start: int):  # type: ignore[no-untyped-def]
        for a, b in Rows(x, y).batches(start, whole, 0):
            yield a.chunk(ranks)[distributed.rank()], b.chunk(ranks)[distributed.rank()]

    ranks = distributed.world_size()
    whole = Protocol(
        **{**SHORT.__dict__, "batch_size": ranks * SHORT.batch_size}
    )  # of which a rank takes its share
    classifier = fit(halves, 28, (64, 10), SHORT, like=x)
    mine = accuracy(classifier, Rows(x.chunk(ranks)[distributed.rank()], y.chunk(ranks)[distributed.rank()]))
    run = Run.open(Path(folder))
    share = cached_features(run, run.splits.test)
    again = cached_features(run, run.splits.test)
    assert torch.equal(share.x, again.x)
    return classifier.weight.detach().numpy(), mine, len(share.x)


def test_ranks_learn_what_one_process_learns(
    pool: Callable[[int], Pool], both_runs: tuple[Path, Path]
) -> None:
    ((alone, top, count),) = pool(1).run(on_a_rank, str(both_runs[0]))
    assert count == 360
    results = pool(2).run(on_a_rank, str(both_runs[0]))
    for weight, its_top, _ in results:
        np.testing.assert_allclose(weight, alone, atol=1e-9)
        assert its_top == pytest.approx(top)
    assert sum(count for _, _, count in results) == 360


def test_a_run_of_a_pipeline_is_evaluated_on_any_ranks(both_runs: tuple[Path, Path]) -> None:
    run = Run.open(both_runs[0], ["engine=deepspeed", "pipeline.stages=2", "pipeline.micro_batches=4"])
    ((batch,),) = train_loader(run, SHORT).steps(0, 1)
    assert len(batch.images) == SHORT.batch_size


@pytest.mark.slow
def test_the_command_on_augmented_images(both_runs: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(both_runs[0], folder)
    with forked_tool(tmp_path, "linear_eval", folder, "--epochs", 2, "--lr", 1) as done:
        assert done.status() == 0, done.stderr
    result = json.loads((folder / "analysis" / "linear_eval_loco.json").read_text())
    assert f"top-1 {result['top1']:.2f} %" in done.stdout and "random encoder" in done.stdout
    assert 10 < result["top1"] <= 100 and result["checkpoint"] == "step-00000004"
    assert State(folder / "linear_eval" / "loco.safetensors", {}).load() == (0, {})
    assert not (folder / "linear_eval" / "loco").exists()
    other = take(folder / "linear_eval" / "loco")
    with forked_tool(tmp_path, "linear_eval", folder, "--epochs", 2, "--lr", 1) as refused:
        assert refused.status() == EXIT_USAGE
    assert "is the folder of a run that is going on" in refused.stderr
    assert "let it end, or choose another preset" in refused.stderr
    other.release()
    shutil.rmtree(folder / "checkpoints")
    with forked_tool(tmp_path, "linear_eval", folder, "--cached") as again:
        assert again.status() == EXIT_USAGE
    assert again.stderr.strip().splitlines()[-1].endswith("let it train until one is")


@pytest.mark.slow
def test_measuring_during_training_does_not_touch_the_encoder(
    pool: Callable[[int], Pool], tmp_path: Path
) -> None:
    from tests.support.trained import make_run

    weights, logs = [], []
    for name, more in (("without", ()), ("with", ("evaluate.every_epochs=1", "evaluate.images=200"))):
        folder = tmp_path / name
        common = ("train.max_steps=30", "evaluate.linear=true")
        pool(1).run(make_run, folder, "run", *common, *more)
        weights.append((folder / "run" / "backbone.safetensors").read_bytes())
        logs.append([e for e in read_log(folder / "run" / "metrics.jsonl") if "scores" in e])
    assert weights[0] == weights[1]
    assert logs[0] == [] and [entry["step"] for entry in logs[1]] == [21]
    assert 50 < logs[1][0]["scores"]["knn_top1"] <= 100
