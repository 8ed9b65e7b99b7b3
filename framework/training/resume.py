"""How a run resumes: from which checkpoint, and whether it may with this batch and number of ranks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from torch import nn

from framework.checkpoints.run_checkpoints import newest_checkpoint, set_aside_later
from framework.checkpoints.snapshot import load_checkpoint, read_model
from framework.config.loading import to_yaml
from framework.config.recipe import Recipe
from framework.engines import Engine
from framework.evaluation.run_folder import recipe_values
from framework.execution import LocalNetwork
from framework.runtime import distributed
from framework.runtime.errors import UserError
from framework.training.position import Position


def restore(recipe: Recipe, engine: Engine, steps_per_epoch: int) -> Position:
    """Load the checkpoint that ``resume`` asks for; where to go on.

    Raises:
        UserError: the checkpoint is damaged, of another network, batch or set of images, or needs another number of
            ranks; a fresh run would mix with an old one.
    """
    run_dir = Path(recipe.run_dir)
    folder = _chosen(recipe, run_dir)
    if folder is None:
        return Position()
    try:
        state = load_checkpoint(folder, engine)
    except UserError as error:
        if others := _other_options(folder, recipe):
            raise UserError(f"{error}; {others}") from error
        raise
    position = Position(**state["position"])
    engine.net.taken = float(not position.skipped)
    with distributed.same_outcome():
        _check_batch(folder, state, recipe, engine.net)
        if (before := state.get("steps_per_epoch", steps_per_epoch)) != steps_per_epoch:
            raise UserError(
                f"{folder}: an epoch of its images had {before} steps, and of those in data.path={recipe.data.path} "
                f"it has {steps_per_epoch}: set data.path, data.train and data.fraction as before, or another run_dir"
            )
    with distributed.same_outcome():
        if distributed.is_main():
            for name in set_aside_later(run_dir, state["step"]):
                print(f"later than {folder.name}, renamed: {name}", flush=True)
            print(f"going on from {folder}", flush=True)
    return position


def _chosen(recipe: Recipe, run_dir: Path) -> Path | None:
    own = recipe.resume in ("auto", "never")
    # "never" and a path are meant for the first start of a job. When Slurm starts it again, it is to go on.
    started_again = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
    if not own and not started_again:
        return Path(recipe.resume)
    folder = newest_checkpoint(run_dir)
    if folder and recipe.resume == "never" and not started_again:
        raise UserError(
            f"resume=never: {run_dir} already holds {folder.name}; name another run_dir, or resume=auto"
        )
    return folder if folder or own else Path(recipe.resume)


def as_it_goes_on(recipe: Recipe) -> Recipe:
    """The recipe, without the weights that training began with if it goes on: they may be gone since.

    Raises:
        UserError: as ``restore``.
    """
    if _chosen(recipe, Path(recipe.run_dir)) is None:
        return recipe
    return replace(recipe, network=replace(recipe.network, args=recipe.network.architecture))


class EffectiveBatch(NamedTuple):
    """How many images BatchNorm and contrastive losses see together in a step.

    What a step computes depends on these two numbers, and on no other way of splitting the batch.

    Attributes:
        contrast: images that are contrasted; ``None`` without a contrastive loss.
        norm: images that BatchNorm averages over; ``None`` without BatchNorm.
    """

    contrast: int | None
    norm: int | None

    @classmethod
    def of(
        cls, network: LocalNetwork, recipe: Mapping[str, Any], ranks: int, micro_batches: int
    ) -> EffectiveBatch:
        """Of a recipe on so many ranks and micro-batches."""
        norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())
        batch = recipe["train"]["batch_size"]
        replicas = 1 if recipe["network"]["sync_bn"] else ranks // recipe["pipeline"]["stages"]
        return cls(
            contrasted_images(recipe, micro_batches) if network.plan.contrasts else None,
            batch // micro_batches // replicas if norm else None,
        )


def contrasted_images(recipe: Mapping[str, Any], micro_batches: int) -> int:
    """How many images a contrastive loss sees together, over all ranks."""
    batch: int = recipe["train"]["batch_size"]
    return batch if recipe["pipeline"]["contrast"] == "batch" else batch // micro_batches


def _other_options(folder: Path, recipe: Recipe) -> str:
    """How the method's options differ from those of a checkpoint that doesn't fit; empty if they don't."""
    try:
        then, _ = read_model(folder)
    except UserError:
        return ""
    before = {k: v for k, v in recipe_values(then["recipe"]).items() if k.startswith("method.")}
    now = {k: v for k, v in recipe_values(to_yaml(recipe)).items() if k.startswith("method.")}
    others = [f"{key}={before[key]}" for key in before if key in now and before[key] != now[key]]
    others += [f"{key}, which it does not know" for key in now if key not in before]
    return f"its run had {', '.join(others)}" if others else ""


def _check_batch(folder: Path, state: dict[str, Any], recipe: Recipe, net: LocalNetwork) -> None:
    """Refuse to go on where the numbers could not be those of the run that began.

    Raises:
        UserError: see there.
    """
    then, before = yaml.safe_load(state["recipe"]), state["ranks"]
    here, now = asdict(recipe), distributed.world_size()
    if then["seed"] != recipe.seed:
        raise UserError(
            f"{folder}: is of a run with seed={then['seed']}, which sets the order of its images: set that in place of "
            f"{recipe.seed}, or another run_dir"
        )
    batch = then["train"]["batch_size"]
    if batch != recipe.train.batch_size:
        raise UserError(
            f"{folder}: its steps are of {batch} images, and a step is a place in the data: "
            f"train.batch_size={recipe.train.batch_size} must be {batch}"
        )
    micro_batches = then["pipeline"]["micro_batches"] or then["train"]["accumulation"]
    old = EffectiveBatch.of(net, then, before, micro_batches)
    new = EffectiveBatch.of(net, here, now, recipe.micro_batches)
    for what, was, is_now in zip(("losses contrast", "BatchNorm averages over"), old, new, strict=True):
        if was != is_now:
            fits = (
                n
                for n in range(1, batch + 1)
                if batch % n == 0 and EffectiveBatch.of(net, here, now, n) == old
            )
            number = next(fits, None)
            remedy = f"start {before} ranks" if number is None else f"set train.accumulation={number}"
            raise UserError(
                f"{folder}: {what} {was} images there ({before} ranks, micro-batches: {micro_batches}) and {is_now} "
                f"here ({now} ranks, micro-batches: {recipe.micro_batches}, network.sync_bn="
                f"{str(recipe.network.sync_bn).lower()}): {remedy}, with network.sync_bn="
                f"{str(then['network']['sync_bn']).lower()} as before"
            )
