"""Fine-tune a run's network on some of the labels: SimCLR's semi-supervised protocol.

    deepspeed tools/finetune.py RUN --labels 0.01 [--from-scratch] [key=value ...]

The encoder and a new linear classifier learn end to end: SGD with Nesterov momentum 0.9, learning rate 0.05 for a
batch of 256 and in proportion, cosine without warm-up, no weight decay, crop and flip; 60 epochs on 1 % of the
labels, 30 on 10 % and more. The labels are drawn by the recipe's seed, evenly over the classes; SimCLR's own lists
of ImageNet images are others. The result is a run of its own, RUN/finetune-LABELS, which goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from framework.analysis.arguments import only_run, told_apart
from framework.config import loading
from framework.config.recipe import Method, Optim, Pipeline, Recipe
from framework.runtime.command import status
from framework.runtime.errors import UserError

if TYPE_CHECKING:
    from framework.evaluation.run_folder import Run

BATCH = 4096
STEPS_PER_EPOCH = 3  # at least, as 1 % of ImageNet gives


def main() -> int:
    """Write the recipe into the new run folder, and train it; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="a finished run; after it key=value")
    parser.add_argument(
        "--labels", type=float, required=True, help="fraction of the labels, such as 0.01 or 0.1"
    )
    parser.add_argument("--from-scratch", action="store_true", help="without the run's weights, to compare")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()

    folders, overrides = told_apart(arguments.runs)
    if not 0 < arguments.labels <= 1:
        raise UserError(f"--labels {arguments.labels}: must be above 0 and at most 1")

    def read() -> list[Recipe]:
        from framework.evaluation.run_folder import open_runs

        run = only_run(open_runs(folders))
        return [_recipe(run, arguments.labels, arguments.from_scratch, overrides)]

    from framework.training.run import train_all

    return train_all(read)


def _recipe(run: Run, labels: float, from_scratch: bool, overrides: list[str]) -> Recipe:
    """The protocol as a recipe of a new run, written there and read again with the overrides."""
    from framework.data.splits import Splits
    from framework.local.methods import bp
    from framework.runtime import distributed
    from framework.runtime.files import write_whole

    name = f"finetune-{labels:g}{'-from-scratch' if from_scratch else ''}"
    folder = run.folder / name
    data = replace(run.recipe.data, fraction=labels)
    batch = _batch_size(len(Splits.open(replace(run.recipe, data=data)).train))
    recipe = replace(
        run.recipe,
        name=f"{run.recipe.name}-{name}",
        run_dir=str(folder),
        resume="auto",
        data=data,
        method=Method("bp", bp.Options()),
        network=replace(run.recipe.network, args=_arguments(run, from_scratch)),
        optim=Optim("sgd", lr=0.05 * batch / 256, nesterov=True, weight_decay=0.0, warmup_epochs=0.0),
        train=replace(
            run.recipe.train,
            epochs=60 if labels < 0.1 else 30,
            batch_size=batch,
            accumulation=1,
            max_steps=None,
        ),
        pipeline=Pipeline(),
        evaluate=replace(run.recipe.evaluate, knn=False, every_epochs=None),
    )
    if recipe.views.kind != "cifar":
        recipe = replace(recipe, views=replace(recipe.views, kind="supervised"))
    with distributed.same_outcome():
        if distributed.is_main():
            write_whole(folder / "recipe.yaml", loading.to_yaml(recipe))
    return loading.load([str(folder / "recipe.yaml"), *overrides])


def _arguments(run: Run, from_scratch: bool) -> dict[str, object]:
    """What timm builds the network with: the run's weights among it."""
    backbone = run.folder / "backbone.safetensors"
    if from_scratch:
        return run.network_arguments
    if not backbone.exists():
        raise UserError(f"{backbone}: no such file; a run leaves it at its end")
    return {**run.network_arguments, "checkpoint_path": str(backbone.resolve())}


def _batch_size(images: int) -> int:
    """SimCLR's 4096, or less where that would make fewer than three steps an epoch."""
    from framework.runtime import distributed

    ranks = distributed.world_size()
    return max(1, min(BATCH, images // STEPS_PER_EPOCH) // ranks) * ranks


if __name__ == "__main__":
    sys.exit(status(main))
