"""Where a run goes on, and whether it may under this number of ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from torch import nn

from framework import checkpoint, distributed
from framework.config import Recipe
from framework.engines import Engine
from framework.errors import UserError
from framework.execution import LocalNetwork
from framework.local.objectives import SupCon
from framework.loop import Position


def restore(recipe: Recipe, engine: Engine) -> Position:
    """Load the checkpoint that ``resume`` asks for; where to go on.

    Raises:
        UserError: the checkpoint is damaged, of another network or batch, or needs another number of ranks; a
            fresh run would mix with an old one.
    """
    run_dir = Path(recipe.run_dir)
    folder = _chosen(recipe, run_dir)
    if folder is None:
        return Position()
    state = checkpoint.load(folder, engine)
    _check_batch(folder, state, recipe, engine.net)
    with distributed.same_outcome():
        if distributed.is_main():
            for name in checkpoint.set_aside_later(run_dir, state["step"]):
                print(f"later than {folder.name}, renamed: {name}", flush=True)
            print(f"going on from {folder}", flush=True)
    return Position(**state["position"])


def _chosen(recipe: Recipe, run_dir: Path) -> Path | None:
    own = recipe.resume in ("auto", "never")
    # What else than "auto" is said counts for the first start. Slurm's next one is to go on, not to begin again.
    started_again = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
    if not own and not started_again:
        return Path(recipe.resume)
    folder = checkpoint.newest(run_dir)
    if folder and recipe.resume == "never" and not started_again:
        raise UserError(
            f"resume=never: {run_dir} already holds {folder.name}; name another run_dir, or resume=auto"
        )
    return folder if folder or own else Path(recipe.resume)


class Sets(NamedTuple):
    """How many images a step's nonlinear parts see together; losses depend on it, and weights on no other split.

    Attributes:
        contrast: images that are contrasted; ``None`` without a contrastive loss.
        norm: images that BatchNorm averages over; ``None`` without BatchNorm.
    """

    contrast: int | None
    norm: int | None

    @classmethod
    def of(cls, network: LocalNetwork, sync_bn: bool, batch_size: int, accumulation: int, ranks: int) -> Sets:
        """Of ``batch_size`` images in ``accumulation`` micro-batches over so many ranks."""
        contrast = not network.plan.supervised or any(isinstance(m, SupCon) for m in network.modules())
        norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())
        forward = batch_size // accumulation
        return cls(
            forward if contrast else None, (forward if sync_bn else forward // ranks) if norm else None
        )


def _check_batch(folder: Path, state: dict[str, Any], recipe: Recipe, net: LocalNetwork) -> None:
    """Refuse to go on where the numbers could not be those of the run that began.

    Raises:
        UserError: see there.
    """
    then, ranks, now = yaml.safe_load(state["recipe"]), state["ranks"], distributed.world_size()
    batch, accumulation, synced = (
        *map(then["train"].get, ("batch_size", "accumulation")),
        then["network"]["sync_bn"],
    )
    if batch != recipe.train.batch_size:
        raise UserError(
            f"{folder}: its steps are of {batch} images, and a step is a place in the data: "
            f"train.batch_size={recipe.train.batch_size} must be {batch}"
        )
    old = Sets.of(net, synced, batch, accumulation, ranks)
    new = Sets.of(net, recipe.network.sync_bn, batch, recipe.train.accumulation, now)
    for what, before, after in zip(("losses contrast", "BatchNorm averages over"), old, new, strict=True):
        if before != after:
            share = old.norm * (1 if synced else now) if old.norm else old.contrast or batch
            remedy = f"start {ranks} ranks"
            if share <= batch and old == Sets.of(net, synced, batch, batch // share, now):
                remedy = f"set train.accumulation={batch // share} network.sync_bn={str(synced).lower()}"
            raise UserError(
                f"{folder}: {what} {before} images there ({ranks} ranks, train.accumulation={accumulation}) and "
                f"{after} here ({now} ranks, train.accumulation={recipe.train.accumulation}, "
                f"network.sync_bn={str(recipe.network.sync_bn).lower()}): {remedy} as before"
            )
