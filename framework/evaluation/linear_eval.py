"""Linear evaluation of a run: a linear classifier on its frozen encoder, by the protocols of LoCo, MoCo and SimCLR."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Literal

from framework.checkpoints.folder import identity_of
from framework.config.mixing import Mixing
from framework.data.loading.loader import TrainLoader
from framework.evaluation.cached_features import cached_features
from framework.evaluation.linear_classifier import Batches, State, accuracy, evaluate_rows, fit
from framework.evaluation.linear_protocols import Protocol
from framework.evaluation.run_folder import Run
from framework.runtime import distributed
from framework.runtime.errors import UserError
from framework.runtime.run_lock import held

OnEpoch = Callable[[int, float], None]  # is told the epochs done and the last mean loss of this rank


def evaluate_cached(
    run: Run, protocol: Protocol, on_epoch: OnEpoch, trained: bool = True
) -> dict[str, float]:
    """The fast mode: features are computed once, without augmentation. Returns as ``accuracy``.

    Args:
        run: whose encoder is evaluated.
        protocol: how the classifier learns.
        on_epoch: called after every epoch.
        trained: else the encoder is the network as the run's seed makes it.

    Raises:
        UserError: as ``cached_features`` and ``fit``.
    """
    train, test = (
        cached_features(run, shards, trained) for shards in (run.splits.train, run.splits.held_out)
    )
    return evaluate_rows(train, test, run.splits.num_classes, protocol, run.recipe.seed, on_epoch)


def evaluate_augmented(run: Run, protocol: Protocol, preset: str, on_epoch: OnEpoch) -> dict[str, float]:
    """The protocol itself: a new random crop and flip of every image in every epoch. Returns as ``accuracy``.

    Every epoch is saved in ``RUN/linear_eval/PRESET.safetensors``, and a second call goes on from there.

    Raises:
        UserError: as ``cached_features`` and ``fit``; another process is at it.
    """
    loader, net = train_loader(run, protocol), run.encoder()
    test = cached_features(run, run.splits.held_out)

    def batches(start: int) -> Batches:
        for (batch,) in loader.steps(start, protocol.epochs * loader.steps_per_epoch):
            assert batch.labels is not None
            yield net.features(batch.images), batch.labels

    settings = protocol.settings(
        **identity_of(run.checkpoint), ranks=distributed.world_size(), data=asdict(run.recipe.data)
    )
    folder = run.folder / "linear_eval"
    with held(folder / preset, "choose another preset") as check:
        classifier = fit(
            batches,
            loader.steps_per_epoch,
            (test.x.shape[1], run.splits.num_classes),
            protocol,
            like=test.x,
            state=State(folder / f"{preset}.safetensors", settings, check),
            on_epoch=on_epoch,
        )
    return accuracy(classifier, test)


def train_loader(run: Run, protocol: Protocol) -> TrainLoader:
    """Crops and flips of a run's training images, in batches of the protocol.

    Raises:
        UserError: the images have no labels.
    """
    recipe = run.splits.recipe
    if not run.splits.train.labeled:
        raise UserError(
            f"{run.splits.train.folder}: has no labels; name a split that has, such as data.train=train"
        )
    kind: Literal["cifar", "supervised"] = "cifar" if recipe.views.kind == "cifar" else "supervised"
    views = replace(recipe.views, kind=kind, rand_augment=None)
    train = replace(recipe.train, batch_size=protocol.batch_size, accumulation=1)
    changed = replace(run.splits, recipe=replace(recipe, views=views, mixing=Mixing(), train=train))
    return changed.train_loader(views_per_image=1)
