"""What a network scores, during its training and at the end: k-NN, linear probe and classifier, in per cent."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

from torch import Tensor

from framework.config.recipe import Recipe
from framework.data.shards.index import ShardSet
from framework.data.splits import Splits
from framework.evaluation.features import (
    EvalBatches,
    evaluating,
    extract,
    in_step,
    network_features,
    pixel_features,
)
from framework.evaluation.knn import knn_top1
from framework.evaluation.linear_probe import linear_top1
from framework.evaluation.run_folder import Run
from framework.execution import LocalNetwork
from framework.runtime import distributed, watchdog
from framework.runtime.errors import UserError

FeaturesOf = Callable[[EvalBatches], tuple[Tensor, Tensor]]


def check_scorable(recipe: Recipe, net: LocalNetwork, splits: Splits) -> None:
    """Refuse before the training what scoring would refuse after it.

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


def score(
    recipe: Recipe,
    net: LocalNetwork,
    splits: Splits,
    untrained: Callable[[], AbstractContextManager[LocalNetwork]],
) -> dict[str, float]:
    """The scores of a finished training: its own, those of the untrained network, and those of raw pixels.

    ``untrained`` makes the network as the recipe's seed does.

    Returns:
        Per cent by name, on rank 0; elsewhere only those that every rank knows. Empty without a test split.
    """
    scores = score_trained(recipe, net, splits)
    if splits.labeled and recipe.evaluate.knn:
        with untrained() as before:
            features_of = partial(network_features, before)
            probed = _probe(recipe, splits, splits.held_out, features_of, recipe.evaluate.linear)
        pixels = _probe(recipe, splits, splits.held_out, pixel_features, linear=False)
        scores |= {f"{key}_untrained": value for key, value in probed.items()}
        scores |= {f"{key}_pixels": value for key, value in pixels.items()}
    return scores


def score_trained(
    recipe: Recipe, net: LocalNetwork, splits: Splits, images: int | None = None
) -> dict[str, float]:
    """The scores of the network alone, on at most ``images`` of each split; returns as ``score`` does."""
    if splits.test is None:
        return {}
    some, test = replace(splits, train=splits.train.subsample(images)), splits.test.subsample(images)
    scores: dict[str, float] = {}
    if net.classifies and test.labeled:
        scores["test_top1"] = classifier_top1(net, some.eval_loader(test))
    if splits.labeled and recipe.evaluate.knn:
        features_of = partial(network_features, net)
        scores |= _probe(recipe, some, test, features_of, recipe.evaluate.linear)
    return scores


def classifier_top1(net: LocalNetwork, loader: EvalBatches) -> float:
    """Top-1 accuracy of the last head in per cent, the same number on all ranks."""
    with evaluating(net):
        _, predicted, labels = extract(lambda x: net.predict(x).argmax(1), in_step(net, loader))
    right, total = int((predicted == labels).sum()), len(labels)
    return 100 * distributed.sum_over_ranks(right) / distributed.sum_over_ranks(total)


def knn_scores(run: Run, neighbors: int | None, images: int | None) -> dict[str, float]:
    """k-NN of a run's encoder, of the same network untrained, and of raw pixels.

    Args:
        run: whose newest checkpoint is the encoder.
        neighbors: that vote; those of the recipe if ``None``.
        images: at most so many of each split.

    Returns:
        ``neighbors``, and on rank 0 per cent by kind of features.
    """
    splits, k = run.splits, neighbors or run.recipe.evaluate.neighbors
    some = replace(splits, train=splits.train.subsample(images), test=splits.held_out.subsample(images))
    scores: dict[str, float] = {"neighbors": k}
    kinds: dict[str, FeaturesOf] = {
        "trained": partial(network_features, run.encoder()),
        "untrained": partial(network_features, run.encoder(trained=False)),
        "raw pixels": pixel_features,
    }
    for name, features_of in kinds.items():
        train, test = (features_of(some.eval_loader(shards)) for shards in (some.train, some.held_out))
        with distributed.same_outcome():
            if distributed.is_main():
                with watchdog.at_work():
                    scores[name] = knn_top1(*train, *test, k)
    return scores


def _probe(
    recipe: Recipe, splits: Splits, test: ShardSet, features_of: FeaturesOf, linear: bool
) -> dict[str, float]:
    """k-NN and, with ``linear``, linear probe of one kind of features, on rank 0."""
    scores: dict[str, float] = {}
    known, asked = (features_of(splits.eval_loader(shards)) for shards in (splits.train, test))
    with distributed.same_outcome():
        if distributed.is_main():
            with watchdog.at_work():
                scores["knn_top1"] = knn_top1(*known, *asked, recipe.evaluate.neighbors)
                if linear:
                    scores["linear_top1"] = linear_top1(*known, *asked)
    return scores
