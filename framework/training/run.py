"""A run from its recipe to its results, top to bottom."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable
from pathlib import Path

from framework.config.recipe import Recipe
from framework.data.splits import Splits
from framework.evaluation.scoring import check_scorable, score_trained
from framework.model import recipe_network
from framework.runtime import distributed, joining, requests
from framework.runtime.dead_ranks import dead_ranks_named
from framework.runtime.errors import UserError
from framework.runtime.exit_status import EXIT_TRY_AGAIN
from framework.runtime.requests import Request
from framework.runtime.watchdog import Watchdog
from framework.training.engine_choice import build_engine
from framework.training.loop import Loop
from framework.training.results import leave_results
from framework.training.resume import restore


def train_all(read: Callable[[], Iterable[Recipe]]) -> int:
    """Join the other ranks, and train recipes one after the other until somebody asks for an end.

    Args:
        read: says, once the ranks have met, what to train.

    Returns:
        The exit status of the command.

    Raises:
        UserError: whatever the person who started it can mend.
    """
    for number in requests.SIGNALS:
        signal.signal(number, requests.leave_at_once)
    joining.start()
    recipes, request = read(), Request.NOTHING
    with dead_ranks_named():
        for recipe in recipes:
            request = train(recipe)
            if request >= Request.STOP:
                break
    joining.stop()
    return EXIT_TRY_AGAIN if request is Request.LEAVE else 0


def train(recipe: Recipe) -> Request:
    """Train from the newest checkpoint on; at the end leave the results.

    Returns:
        ``STOP`` or ``LEAVE`` if somebody asked for it before the end.

    Raises:
        UserError: whatever the person who started it can mend.
    """
    stages = recipe.pipeline.stages
    if distributed.world_size() % stages:
        raise UserError(
            f"pipeline.stages={stages}: must divide the number of ranks, {distributed.world_size()}"
        )
    splits = Splits.open(recipe)
    with distributed.same_outcome():
        net = recipe_network(recipe, splits.num_classes)
        loader = splits.train_loader(net.plan.views)
        if net.teacher is not None:
            net.teacher.total = recipe.train.epochs * loader.steps_per_epoch
        if net.plan.supervised and not splits.train.labeled:
            raise UserError(
                f"{splits.train.folder}: has no labels, and method.name={recipe.method.name} needs them"
            )
        check_scorable(recipe, net, splits)
    with Watchdog(Path(recipe.run_dir), recipe.faults.hang_seconds) as watchdog:
        engine = build_engine(recipe, net, splits.num_classes)
        position = restore(recipe, engine, loader.steps_per_epoch)

        def score() -> dict[str, float]:
            with watchdog.asleep():
                return score_trained(recipe, engine.whole_net(), splits, recipe.evaluate.images)

        loop = Loop(recipe, engine, loader, position, score)
        request = loop.run(watchdog.step)
    if request >= Request.STOP:
        if distributed.is_main():
            print(f"stopped after step {loop.position.step}; the same command goes on from there", flush=True)
    else:
        leave_results(recipe, engine, splits, loop.summary())
    engine.close()
    return request
