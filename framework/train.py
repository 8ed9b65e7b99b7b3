"""Train a network with local losses.

    deepspeed framework/train.py recipes/quickstart.yaml [key=value ...]

Shards become views, views go through the network's segments, heads give losses, the network routes their
gradients, an engine averages them over ranks and steps the optimizer. What is left is in ``results.py``.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from framework import checkpoint, config, distributed, engines
from framework.config import Recipe
from framework.data.splits import Splits
from framework.engines import Engine
from framework.errors import LocalError, UserError
from framework.execution import LocalNetwork
from framework.execution.placement import Placement
from framework.loop import Loop, Position
from framework.model import recipe_network
from framework.optim import build_optimizer
from framework.pipeline.balance import place
from framework.results import leave_results


def main(argv: Sequence[str] | None = None) -> int:
    """Run a recipe; returns the exit status."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        recipe = config.load(sys.argv[1:] if argv is None else argv)
        distributed.start()
        train(recipe)
    except UserError as error:
        if distributed.launched_rank() == 0 or isinstance(error, LocalError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    distributed.stop()
    return 0


def train(recipe: Recipe) -> None:
    """Train to the end, from the newest checkpoint if there is one, and leave the results.

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
        untrained = recipe_network(recipe, splits.num_classes)
        loader = splits.train_loader(net.plan.views)
        if net.plan.supervised and not splits.train.labelled:
            raise UserError(
                f"{splits.train.folder}: has no labels, and method.name={recipe.method.name} needs them"
            )
    placement = place(recipe, net, splits.num_classes) if recipe.pipelined else None
    engine = build_engine(recipe, net, placement)
    position = restore(recipe, engine)
    loop = Loop(recipe, engine, loader, position)
    loop.run()
    leave_results(recipe, engine, untrained, splits, loop.summary())
    engine.close()


def build_engine(recipe: Recipe, net: LocalNetwork, placement: Placement | None = None) -> Engine:
    """The network under the recipe's engine and optimizer, in pipeline stages where they have a placement."""
    optim = recipe.optim
    make_optimizer = partial(
        build_optimizer,
        name=optim.name,
        momentum=optim.momentum,
        nesterov=optim.nesterov,
        weight_decay=optim.weight_decay,
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
    )


def restore(recipe: Recipe, engine: Engine) -> Position:
    """Load the checkpoint that ``resume`` asks for; where to go on.

    Raises:
        UserError: the checkpoint is damaged or of another network, or a fresh run would mix with an old one.
    """
    run_dir = Path(recipe.run_dir)
    folder = checkpoint.newest(run_dir) if recipe.resume in ("auto", "never") else Path(recipe.resume)
    if folder is None:
        return Position()
    if recipe.resume == "never":
        raise UserError(
            f"resume=never: {run_dir} already holds {folder.name}; name another run_dir, or resume=auto"
        )
    state = checkpoint.load(folder, engine)
    if distributed.is_main():
        print(f"going on from {folder}", flush=True)
    return Position(**state["position"])


if __name__ == "__main__":
    sys.exit(main())
