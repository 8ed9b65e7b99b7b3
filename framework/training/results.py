"""What a finished run leaves: scores beside their baselines, the loss curves, the backbone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from framework.analysis.curves import loss_curves
from framework.checkpoints import snapshot
from framework.config.recipe import Recipe
from framework.data.shards.index import ShardSet
from framework.data.splits import Splits
from framework.engines import Engine
from framework.evaluation import features
from framework.execution import LocalNetwork
from framework.model import recipe_network
from framework.runtime import distributed
from framework.runtime.errors import UserError
from framework.tracking import metrics

Encode = Callable[[features.EvalBatches], tuple[Tensor, Tensor]]


def leave_results(recipe: Recipe, engine: Engine, splits: Splits, run: dict[str, Any]) -> dict[str, Any]:
    """Evaluate, print the scores and write ``result.json``, ``loss_curves.png`` and ``backbone.safetensors``.

    Args:
        recipe: of the run.
        engine: holds the trained network.
        splits: images to score on.
        run: what the training loop measured.

    Returns:
        What ``result.json`` holds.
    """
    run_dir = Path(recipe.run_dir)
    # Before the scores, which may fail over an image.
    snapshot.export_backbone(engine, run_dir / "backbone.safetensors")
    scores = score(recipe, engine.whole_net(), splits)
    result = {
        "name": recipe.name,
        "method": recipe.method.name,
        "network": recipe.network.name,
        **{key: round(value, 4) for key, value in scores.items()},
        **run,
        "train_images": len(splits.train),
        "peak_memory_bytes": metrics.peak_memory_bytes(distributed.device()),
        "seed": recipe.seed,
        **metrics.environment(distributed.world_size(), distributed.device()),
    }
    with distributed.same_outcome():
        if distributed.is_main():
            title = f"{recipe.name}: {recipe.method.name} on {recipe.network.name}"
            loss_curves(run_dir / "metrics.jsonl", run_dir / "loss_curves.png", title)
            metrics.write_result(run_dir / "result.json", result)
            show(scores, result, run_dir)
    return result


def check(recipe: Recipe, net: LocalNetwork, splits: Splits) -> None:
    """Refuse what scoring would only refuse after the training.

    Raises:
        UserError: fewer training images than neighbors are asked for, or fewer test images than ranks.
    """
    if splits.test is None:
        return
    evaluation, known, asked = recipe.evaluate, len(splits.train), len(splits.test)
    if evaluation.every_epochs is not None and evaluation.images is not None:
        known, asked = min(known, evaluation.images), min(asked, evaluation.images)
    probed = evaluation.knn and splits.labeled
    if probed and known < evaluation.neighbors:
        raise UserError(
            f"evaluate.neighbors={evaluation.neighbors}: must be at most {known}, the training images to score with"
        )
    classified = net.classifies and splits.test.labeled
    if (probed or classified) and asked < distributed.world_size():
        raise UserError(
            f"{splits.test.folder}: {asked} images to score on are fewer than the {distributed.world_size()} ranks"
        )


def score(recipe: Recipe, net: LocalNetwork, splits: Splits) -> dict[str, float]:
    """Accuracies in per cent, on rank 0; elsewhere only those that every rank knows.

    *Untrained* is the network as the recipe's seed makes it.
    """
    scores: dict[str, float] = {}
    test = splits.test
    if test is None:
        return scores
    if net.classifies and test.labeled:
        scores["test_top1"] = features.test_top1(net, splits.eval_loader(test))
    if splits.labeled and recipe.evaluate.knn:
        linear = recipe.evaluate.linear
        untrained = recipe_network(recipe, splits.num_classes).to(distributed.device())
        for suffix, encode, fit in (
            ("", partial(features.features, net), linear),
            ("_untrained", partial(features.features, untrained), linear),
            ("_pixels", features.pixels, False),
        ):
            probed = _probe(recipe, splits, test, encode, fit)
            scores |= {f"{key}{suffix}": value for key, value in probed.items()}
    return scores


def score_now(recipe: Recipe, net: LocalNetwork, splits: Splits) -> dict[str, float]:
    """What is measured during training, on ``evaluate.images`` of each split; as ``score``."""
    if splits.test is None:
        return {}
    images = recipe.evaluate.images
    some, test = replace(splits, train=splits.train.subsample(images)), splits.test.subsample(images)
    scores: dict[str, float] = {}
    if net.classifies and test.labeled:
        scores["test_top1"] = features.test_top1(net, some.eval_loader(test))
    if splits.labeled and recipe.evaluate.knn:
        scores |= _probe(recipe, some, test, partial(features.features, net), recipe.evaluate.linear)
    return scores


def _probe(recipe: Recipe, splits: Splits, test: ShardSet, encode: Encode, linear: bool) -> dict[str, float]:
    """k-NN and linear probe of one kind of features, on rank 0."""
    scores: dict[str, float] = {}
    known, asked = (encode(splits.eval_loader(shards)) for shards in (splits.train, test))
    with distributed.same_outcome():
        if distributed.is_main():
            scores["knn_top1"] = features.knn_top1(*known, *asked, recipe.evaluate.neighbors)
            if linear:
                scores["linear_top1"] = features.linear_top1(*known, *asked)
    return scores


def show(scores: dict[str, float], result: dict[str, Any], run_dir: Path) -> None:
    """Print the scores as a table, and where everything is."""
    table = Table()
    table.add_column("top-1 in %")
    columns = {"": "trained", "_untrained": "untrained", "_pixels": "raw pixels"}
    for column in columns.values():
        table.add_column(column, justify="right")
    for key, label in (("knn_top1", "k-NN"), ("linear_top1", "linear probe"), ("test_top1", "classifier")):
        if key in scores:
            cells = (f"{scores[key + c]:.1f}" if key + c in scores else "-" for c in columns)
            table.add_row(label, *cells)
    console = Console()
    if scores:
        console.print(f"{result['name']}, scored on the held-out split:", highlight=False)
        console.print(table)
    console.print(
        f"{result['steps']} steps, {result['images_per_second']:.0f} images/s; "
        f"recipe, metrics, curves, checkpoint and backbone are in {run_dir}",
        highlight=False,
        soft_wrap=True,
    )
