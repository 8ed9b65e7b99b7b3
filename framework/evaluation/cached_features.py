"""Features of a split, computed once by all ranks together and kept beside the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from framework.checkpoints.folder import identity_of
from framework.data.shards.index import ShardSet
from framework.evaluation.features import extract
from framework.evaluation.linear_classifier import Rows
from framework.evaluation.run_folder import Run
from framework.runtime import distributed
from framework.runtime.errors import UserError
from framework.runtime.files import write_whole


def cached_features(run: Run, shards: ShardSet, trained: bool = True) -> Rows:
    """This rank's share of the pooled features of a split, from ``RUN/features`` if they are there.

    Central crops, no augmentation, float32. The files are those of this checkpoint, these images and this
    number of ranks, or they are computed anew.

    Args:
        run: whose newest checkpoint is the encoder.
        shards: the split.
        trained: else the encoder is the network as the run's seed makes it.

    Raises:
        UserError: no checkpoint, no labels, or features that are not finite.
    """
    name = run.checkpoint.name if trained else "untrained"
    ranks = f"{distributed.rank() + 1}of{distributed.world_size()}"
    path = run.folder / "features" / f"{Path(shards.folder).name}-{name}-{ranks}.safetensors"
    key = json.dumps(_key(run, shards, trained), sort_keys=True)
    rows = _read(path, key)
    everywhere = all(text == "yes" for text in distributed.gather_text("yes" if rows else "no"))
    if rows is None or not everywhere:
        if not shards.labeled:
            raise UserError(
                f"{shards.folder}: has no labels; name a split that has, such as data.train=train"
            )
        _, x, y = extract(run.encoder(trained).features, run.splits.eval_loader(shards))
        rows = Rows(x.float(), y)
        with distributed.same_outcome():
            write_whole(path, save({"x": rows.x.cpu(), "y": rows.y.cpu()}, {"key": key}))
    with distributed.same_outcome():
        if broken := int((~rows.x.isfinite()).any(1).sum()):
            raise UserError(f"features of {broken} of {len(rows.x)} images are not finite: training diverged")
    return Rows(rows.x.to(distributed.device()), rows.y.to(distributed.device()))


def _read(path: Path, key: str) -> Rows | None:
    try:
        with safe_open(path, "pt") as file:
            if file.metadata()["key"] == key:
                return Rows(file.get_tensor("x"), file.get_tensor("y"))
    except (OSError, SafetensorError):
        pass
    return None


def _key(run: Run, shards: ShardSet, trained: bool) -> dict[str, Any]:
    """What the features depend on."""
    recipe = run.recipe
    return {
        "weights": identity_of(run.checkpoint)["weights"] if trained else f"seed {recipe.seed}",
        "network": [recipe.network.name, recipe.network.args, recipe.train.precision],
        "images": [str(shards.folder), len(shards), int(shards.table.length.sum())],
        "size": recipe.data.image_size,
        "views": [recipe.views.mean, recipe.views.std, recipe.views.center],
    }
