"""Fine-tuning a run's network on some of the labels, as a recipe: SimCLR's semi-supervised protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from framework.config import loading
from framework.config.mixing import Mixing
from framework.config.recipe import Method, Optim, Pipeline, Recipe
from framework.data.splits import Splits
from framework.evaluation.run_folder import Run
from framework.local.methods import bp
from framework.runtime import distributed
from framework.runtime.errors import UserError

BATCH = 4096
STEPS_PER_EPOCH = 3  # at least, as 1 % of ImageNet gives


def fine_tuning_recipe(run: Run, labels: float, from_scratch: bool, overrides: Sequence[str]) -> Recipe:
    """The protocol as the recipe of a new run, in a folder of the run that is tuned; all ranks must call it.

    Args:
        run: whose network is tuned.
        labels: fraction of them, above 0 and at most 1.
        from_scratch: begin with random weights, to compare.
        overrides: ``key=value`` over the protocol. Its batch size follows from the images that they name.

    Raises:
        UserError: no images, no weights, or an override does not fit.
    """
    recipe = _protocol(run, labels, from_scratch)
    images = len(Splits.open(_overridden(recipe, overrides)).train)
    batch = _batch_size(images)
    optim = replace(recipe.optim, lr=0.05 * batch / 256)
    return _overridden(replace(recipe, optim=optim, train=replace(recipe.train, batch_size=batch)), overrides)


def _protocol(run: Run, labels: float, from_scratch: bool) -> Recipe:
    """All of it but the batch size and the learning rate, which depend on the number of images."""
    name = f"finetune-{labels:g}{'-from-scratch' if from_scratch else ''}"
    epochs = 60 if labels < 0.1 else 30
    recipe = replace(
        run.recipe,
        name=f"{run.recipe.name}-{name}",
        run_dir=str(run.folder / name),
        resume="auto",
        data=replace(run.recipe.data, fraction=labels),
        method=Method("bp", bp.Options()),
        network=replace(run.recipe.network, args=_arguments(run, from_scratch), freeze=[]),
        optim=Optim("sgd", nesterov=True, weight_decay=0.0, warmup_epochs=0.0),
        train=replace(
            run.recipe.train, epochs=epochs, accumulation=1, max_steps=None, label_smoothing=0.0, ema=0.0
        ),
        views=replace(run.recipe.views, rand_augment=None),
        mixing=Mixing(),
        pipeline=Pipeline(),
        evaluate=replace(run.recipe.evaluate, knn=False, every_epochs=None),
    )
    if recipe.views.kind == "cifar":
        return recipe
    return replace(recipe, views=replace(recipe.views, kind="supervised"))


def _arguments(run: Run, from_scratch: bool) -> dict[str, object]:
    """What timm builds the network with: the run's weights among it."""
    backbone = run.folder / "backbone.safetensors"
    if from_scratch:
        return run.network_arguments
    if not backbone.exists():
        raise UserError(f"{backbone}: no such file; a run leaves it at its end")
    return {**run.network_arguments, "checkpoint_path": str(backbone.resolve())}


def _overridden(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(loading.to_yaml(recipe))
        return loading.load([str(path), *overrides])


def _batch_size(images: int) -> int:
    """SimCLR's 4096, or less where that would make fewer than three steps an epoch."""
    ranks = distributed.world_size()
    return max(1, min(BATCH, images // STEPS_PER_EPOCH) // ranks) * ranks
