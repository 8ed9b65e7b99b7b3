"""The training and the held-out split of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from framework import distributed
from framework.config import Recipe
from framework.data.digits import prepare_digits
from framework.data.index import ShardSet
from framework.data.loader import EvalLoader, TrainLoader
from framework.errors import UserError


@dataclass(frozen=True)
class Splits:
    """Shards of both splits, and the loaders that a recipe makes of them.

    Attributes:
        train: the images that networks learn from.
        test: those they are measured on.
        num_classes: of the labels; 0 without labels.
    """

    recipe: Recipe
    train: ShardSet
    test: ShardSet
    num_classes: int

    @classmethod
    def open(cls, recipe: Recipe) -> Splits:
        """Open the shards, after packing them where ``data.source`` says how.

        Raises:
            UserError: shards missing or broken, or ``data.num_classes`` does not fit the labels.
        """
        data, folder = recipe.data, Path(recipe.data.path)
        with distributed.same_outcome():
            if data.source == "digits" and distributed.is_main():
                prepare_digits(folder)
        with distributed.same_outcome():
            train, test = ShardSet.open(folder / data.train), ShardSet.open(folder / data.test)
            return cls(recipe, train, test, _classes(data.num_classes, train, test))

    def train_loader(self, views_per_image: int) -> TrainLoader:
        """This rank's share of the training batches."""
        return TrainLoader(
            self.train,
            self.recipe.views,
            image_size=self.recipe.data.image_size,
            batch_size=self.recipe.train.batch_size,
            views_per_image=views_per_image,
            accumulation=self.recipe.train.accumulation,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            seed=self.recipe.seed,
            workers=self.recipe.data.workers,
            device=distributed.device(),
        )

    def eval_loader(self, shards: ShardSet) -> EvalLoader:
        """This rank's share of a split, every sample once."""
        return EvalLoader(
            shards,
            self.recipe.views,
            image_size=self.recipe.data.image_size,
            batch_size=self.recipe.evaluate.batch_size,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            workers=self.recipe.data.workers,
            device=distributed.device(),
        )


def _classes(wanted: int | None, train: ShardSet, test: ShardSet) -> int:
    for shards in (train, test):
        highest = int(shards.labels.max())
        if wanted is not None and highest >= wanted:
            raise UserError(
                f"data.num_classes={wanted}: {shards.folder} has labels up to {highest}, so at least {highest + 1}"
            )
    names = max((len(shards.classes) for shards in (train, test) if shards.classes), default=0)
    found = max(names, int(train.labels.max()) + 1, int(test.labels.max()) + 1)
    if wanted is not None and wanted < names:
        raise UserError(f"data.num_classes={wanted}: {train.folder} names {names} classes")
    return wanted or found
