"""A run from its recipe to its results, top to bottom."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from framework.config.recipe import Recipe
from framework.cost.utilization import Utilization, utilization
from framework.data.loading.loader import TrainLoader
from framework.data.splits import Splits
from framework.evaluation.features import averaged
from framework.evaluation.scoring import check_scorable, score_trained
from framework.execution import LocalNetwork
from framework.local import Need
from framework.runtime import distributed, joining, requests, watchdog
from framework.runtime.errors import UserError
from framework.runtime.exit_status import EXIT_TRY_AGAIN
from framework.runtime.requests import Request
from framework.runtime.run_lock import held
from framework.tracking.environment import device_name
from framework.training.engine_choice import build_engine, build_network
from framework.training.loop import Loop
from framework.training.results import leave_results
from framework.training.resume import as_it_goes_on, contrasted_images, restore


def train_all(read: Callable[[], Iterable[Recipe]], run_dir: Path, hang_seconds: float) -> int:
    """Join the other ranks, and train recipes one after the other until somebody asks for an end.

    Args:
        read: says, once the ranks have met, what to train.
        run_dir: gets reports of ranks that hang.
        hang_seconds: of ``faults``, until the recipes are read.

    Returns:
        The exit status of the command.

    Raises:
        UserError: whatever the person who started it can mend.
    """
    for number in requests.SIGNALS:
        signal.signal(number, requests.leave_at_once)
    request = Request.NOTHING
    with joining.joined(run_dir, hang_seconds) as dog:
        for recipe in read():
            dog.run_dir, dog.limit = Path(recipe.run_dir), recipe.faults.hang_seconds
            request = train(recipe)
            if request >= Request.STOP:
                break
    return EXIT_TRY_AGAIN if request is Request.LEAVE else 0


@contextmanager
def _one_value_named(recipe: Recipe) -> Iterator[None]:
    """PyTorch's word on a BatchNorm that has nothing to normalize over, as one of the recipe's."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("Expected more than 1 value per channel"):
            raise
        raise UserError(
            f"train.batch_size={recipe.train.batch_size}: too small for data.image_size={recipe.data.image_size}: a "
            f"BatchNorm gets one value per channel on a rank; take more images a micro-batch, or larger ones"
        ) from error


def train(recipe: Recipe) -> Request:
    """Train from the newest checkpoint on; at the end leave the results.

    Returns:
        ``STOP`` or ``LEAVE`` if somebody asked for it before the end.

    Raises:
        UserError: whatever the person who started it can mend.
    """
    with watchdog.during("opening the data"):
        splits, net, loader = _opened(recipe)
    with held(Path(recipe.run_dir)) as check:
        engine = build_engine(recipe, net, splits.num_classes)
        position = restore(recipe, engine, loader.steps_per_epoch)

        def score() -> dict[str, float]:
            with watchdog.during("scoring"), averaged(engine.whole_net()) as net:
                return score_trained(recipe, net, splits, recipe.evaluate.images)

        loop = Loop(recipe, engine, loader, position, score, check, _utilization(recipe, splits.num_classes))
        with _one_value_named(recipe):
            request = loop.run(watchdog.step)
        if request >= Request.STOP:
            if distributed.is_main():
                print(
                    f"stopped after step {loop.position.step}; the same command goes on from there",
                    flush=True,
                )
        else:
            with watchdog.during("scoring"):
                leave_results(recipe, engine, splits, loop.summary(), check)
        engine.close()
    return request


def _utilization(recipe: Recipe, num_classes: int) -> Utilization | None:
    """Of all GPUs, on rank 0, which writes it down."""
    device = distributed.device()
    if device.type != "cuda" or not distributed.is_main():
        return None
    devices = distributed.world_size()
    with distributed.replicas("alone"):
        return utilization(recipe, num_classes, device_name(device), devices)


def _opened(recipe: Recipe) -> tuple[Splits, LocalNetwork, TrainLoader]:
    """Images, network and loader of a recipe, which go together."""
    stages = recipe.pipeline.stages
    if distributed.world_size() % stages:
        raise UserError(
            f"pipeline.stages={stages}: must divide the number of ranks, {distributed.world_size()}"
        )
    splits = Splits.open(recipe)
    built = as_it_goes_on(recipe)
    with distributed.same_outcome():
        net = build_network(built, splits.num_classes)
        loader = splits.train_loader(net.plan.views)
        if net.teacher is not None:
            net.teacher.total = recipe.train.epochs * loader.steps_per_epoch
        if net.plan.supervised and not splits.train.labeled:
            raise UserError(
                f"{splits.train.folder}: has no labels, and method.name={recipe.method.name} needs them"
            )
        _check_contrast(recipe, net)
        _check_mixing(recipe, net)
        check_scorable(recipe, net, splits)
    return splits, net, loader


def _check_mixing(recipe: Recipe, net: LocalNetwork) -> None:
    """Refuse to mix what a head can't learn from.

    Raises:
        UserError: no head learns from labels, one compares them, or there are several views of an image.
    """
    key = recipe.mixing.key
    if key is None:
        return
    if not net.plan.supervised or net.plan.views > 1:
        raise UserError(f"{key}: mixes images with labels, and method.name={recipe.method.name} has none")
    for unit in net.plan.units:
        if Need.LABELS in unit.head.needs and not unit.head.soft_labels:
            raise UserError(
                f"{key}: unit {unit.name} of method.name={recipe.method.name} needs one class an image, as supervised "
                "contrast does; must be 0"
            )


def _check_contrast(recipe: Recipe, net: LocalNetwork) -> None:
    """Refuse micro-batches that are too small for a loss.

    Raises:
        UserError: there is a unit that would learn nothing.
    """
    together = contrasted_images(asdict(recipe), recipe.micro_batches)
    for unit in net.plan.units:
        if unit.head.fewest_images > together:
            raise UserError(
                f"train.batch_size={recipe.train.batch_size} in micro-batches: {recipe.micro_batches} "
                f"(train.accumulation): unit {unit.name} compares images with each other and needs "
                f"{unit.head.fewest_images} or more in a micro-batch of all ranks, not {together}"
            )
