"""Train a network with local losses.

    deepspeed framework/train.py recipes/quickstart.yaml [key=value ...]

Shards become views, views go through the network's segments, heads give losses, the network routes their
gradients, an engine averages them over ranks and steps the optimizer. What is left is in ``results.py``.

PyTorch, timm and DeepSpeed take ten seconds to import. So functions import what needs them, and ``main`` reads the
recipe before that: what is wrong in it is told at once.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from framework.config import loading
from framework.data.places import check_train_folder
from framework.runtime.command import status
from framework.runtime.errors import UserError

if TYPE_CHECKING:
    from framework.config.recipe import Recipe
    from framework.engines import Engine
    from framework.execution import LocalNetwork
    from framework.pipeline.scheduling.placement import Placement
    from framework.runtime.requests import Request


def main(argv: Sequence[str] | None = None) -> int:
    """Read a recipe and train it; returns the exit status: 0, ``EXIT_USAGE`` or ``EXIT_TRY_AGAIN``."""

    def work() -> int:
        recipe = loading.load(sys.argv[1:] if argv is None else argv)
        check_train_folder(recipe.data)
        from framework.model import parts

        return train_all(lambda: parts(recipe))

    return status(work)


def train_all(read: Callable[[], Iterable[Recipe]]) -> int:
    """Join the other ranks, and train recipes one after the other until somebody asks for an end.

    Args:
        read: says, once the ranks have met, what to train.

    Returns:
        The exit status of the command.

    Raises:
        UserError: whatever the person who started it can mend.
    """
    from framework.runtime import distributed, requests
    from framework.runtime.dead_ranks import dead_ranks_named
    from framework.runtime.requests import Request

    for number in requests.SIGNALS:
        signal.signal(number, requests.leave_at_once)
    distributed.start()
    recipes, request = read(), Request.NOTHING
    with dead_ranks_named():
        for recipe in recipes:
            request = train(recipe)
            if request >= Request.STOP:
                break
    distributed.stop()
    return requests.EXIT_TRY_AGAIN if request is Request.LEAVE else 0


def train(recipe: Recipe) -> Request:
    """Train from the newest checkpoint on; at the end leave the results.

    Returns:
        ``STOP`` or ``LEAVE`` if somebody asked for it before the end.

    Raises:
        UserError: whatever the person who started it can mend.
    """
    from framework.data.splits import Splits
    from framework.model import recipe_network
    from framework.pipeline.scheduling.balance import place
    from framework.runtime import distributed
    from framework.runtime.requests import Request
    from framework.runtime.watchdog import Watchdog
    from framework.training.loop import Loop
    from framework.training.results import check, leave_results, score_now
    from framework.training.resume import restore

    stages = recipe.pipeline.stages
    if distributed.world_size() % stages:
        raise UserError(
            f"pipeline.stages={stages}: must divide the number of ranks, {distributed.world_size()}"
        )
    splits = Splits.open(recipe)
    with distributed.same_outcome():
        net = recipe_network(recipe, splits.num_classes)
        loader = splits.train_loader(net.plan.views)
        if net.plan.supervised and not splits.train.labeled:
            raise UserError(
                f"{splits.train.folder}: has no labels, and method.name={recipe.method.name} needs them"
            )
        check(recipe, net, splits)
    with Watchdog(Path(recipe.run_dir), recipe.faults.hang_seconds) as watchdog:
        placement = place(recipe, net, splits.num_classes) if recipe.pipelined else None
        engine = build_engine(recipe, net, placement)
        position = restore(recipe, engine, loader.steps_per_epoch)

        def score() -> dict[str, float]:
            with watchdog.asleep():
                return score_now(recipe, engine.whole_net(), splits)

        loop = Loop(recipe, engine, loader, position, score)
        request = loop.run(watchdog.step)
    if request >= Request.STOP:
        if distributed.is_main():
            print(f"stopped after step {loop.position.step}; the same command goes on from there", flush=True)
    else:
        leave_results(recipe, engine, splits, loop.summary())
    engine.close()
    return request


def build_engine(recipe: Recipe, net: LocalNetwork, placement: Placement | None = None) -> Engine:
    """The network under the recipe's engine and optimizer, in pipeline stages where they have a placement."""
    from framework import engines
    from framework.optim import build_optimizer

    optim = recipe.optim
    make_optimizer = partial(
        build_optimizer,
        name=optim.name,
        momentum=optim.momentum,
        nesterov=optim.nesterov,
        weight_decay=optim.weight_decay,
        decay=optim.decay,
        trust=optim.trust,
    )
    return engines.build(
        recipe.engine,
        net,
        make_optimizer,
        batch_size=recipe.train.batch_size,
        accumulation=recipe.micro_batches,
        clip=optim.clip,
        zero_stage=recipe.zero_stage,
        deepspeed=recipe.deepspeed,
        pipeline=recipe.pipeline,
        placement=placement,
        cuda_graph=recipe.execution.cuda_graph,
    )


if __name__ == "__main__":
    sys.exit(main())
