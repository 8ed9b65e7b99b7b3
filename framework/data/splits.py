"""The training and the held-out split of a recipe."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

from framework.config.recipe import Data, Recipe
from framework.data.augment.mixing import Mixer
from framework.data.loading.loader import EvalLoader, TrainLoader
from framework.data.loading.sample_order import AHEAD, balanced
from framework.data.packing.digits import prepare_digits
from framework.data.shards.index import ShardSet
from framework.data.shards.labels import are_identifiers
from framework.data.shards.remote import open_remote
from framework.data.shards.store import Store, is_url
from framework.data.split_paths import check_path, check_split, split_path
from framework.runtime import distributed
from framework.runtime.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Splits:
    """Shards of both splits, and the loaders that a recipe makes of them.

    Attributes:
        train: the images that networks learn from.
        test: those they are measured on; ``None`` where it is missing (behind a URL: neither its index nor a
            listing is to be had), then nothing is scored.
        num_classes: of the labels; 0 without labels.
    """

    recipe: Recipe
    train: ShardSet
    test: ShardSet | None
    num_classes: int

    @classmethod
    def open(cls, recipe: Recipe) -> Splits:
        """Open the shards, after packing them where ``data.prepare`` says how.

        Raises:
            UserError: shards missing or broken, ``data.num_classes`` does not fit the labels, or the splits
                name their classes differently.
        """
        data = recipe.data
        check_path(data)
        if data.prepare == "digits" and is_url(data.path):
            raise UserError(f"data.path={data.path}: the digits are packed into a local folder")
        with distributed.same_outcome():
            if distributed.is_main():  # packs and indexes; the others find that done
                if data.prepare == "digits":
                    prepare_digits(Path(data.path))
                train, test = _open(data, data.train), _open_test(data)
                if test is None:
                    missing = f"{data.path}/{data.test}"
                    logger.warning("%s: no such folder, so nothing will be scored (data.test)", missing)
                _say_unlabeled(train if test is None or not train.labeled else test)
        with distributed.same_outcome():
            train, test = _open(data, data.train), _open_test(data)
            if is_url(data.path):
                _check_window(train, data)
            if test is not None:
                _check_names(train, test)
                _check_disjoint(data, train, test)
            classes = _classes(data.num_classes, train, test)
            if data.fraction < 1:
                train = train.take(balanced(train.labels, data.fraction, recipe.seed))
            return cls(recipe, train, test, classes)

    @property
    def labeled(self) -> bool:
        """Whether features can be scored: both splits have labels, those of the training split of two classes."""
        if self.test is None or not (self.train.labeled and self.test.labeled):
            return False
        return bool((self.train.labels != self.train.labels[0]).any())

    @property
    def held_out(self) -> ShardSet:
        """The test split.

        Raises:
            UserError: there is none.
        """
        if self.test is None:
            raise UserError(
                f"{self.recipe.data.path}/{self.recipe.data.test}: no such folder; images to score on are needed"
            )
        return self.test

    def train_loader(self, views_per_image: int) -> TrainLoader:
        """This rank's part of the training batches; in a pipeline its replica's part, which the first stage reads."""
        replicas, mixing = distributed.world_size() // self.recipe.pipeline.stages, self.recipe.mixing
        return TrainLoader(
            self.train,
            self.recipe.views,
            image_size=self.recipe.data.image_size,
            batch_size=self.recipe.train.batch_size,
            views_per_image=views_per_image,
            accumulation=self.recipe.micro_batches,
            rank=distributed.rank() % replicas,
            world_size=replicas,
            seed=self.recipe.seed,
            workers=self.recipe.data.workers,
            device=distributed.device(),
            window=self.recipe.data.window,
            in_memory=self.recipe.data.cache == "memory" and distributed.rank() < replicas,
            mixer=Mixer(mixing, self.num_classes, self.recipe.seed) if mixing.key else None,
        )

    def eval_loader(self, shards: ShardSet) -> EvalLoader:
        """This rank's part of a split; over all ranks every sample comes once."""
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


def _open(data: Data, split: str) -> ShardSet:
    folder, pattern = split_path(data, split)
    if is_url(data.path):
        return open_remote(folder, Path(data.cache_dir), round(data.cache_gb * 1e9), pattern)
    check_split(data, split)
    return ShardSet.open(Path(folder), pattern)


def _open_test(data: Data) -> ShardSet | None:
    names = ("test", "val") if data.test == "test" else (data.test,)  # ImageNet has only "val"
    there = (name for name in names if _exists(data, name))
    return next((_open(data, name) for name in there), None)


def _exists(data: Data, split: str) -> bool:
    folder, _ = split_path(data, split)
    return Store(folder).exists() if is_url(data.path) else Path(folder).exists()


def _check_disjoint(data: Data, train: ShardSet, test: ShardSet) -> None:
    """Refuse patterns by which some shards are both trained on and measured on."""
    both = train.shards.keys() & test.shards.keys() if train.folder == test.folder else set()
    if both and both != train.shards.keys():
        raise UserError(
            f"{train.folder}/{min(both)}: is one of {len(both)} shards that data.train='{data.train}' and "
            f"data.test='{data.test}' both name"
        )


def _say_unlabeled(shards: ShardSet) -> None:
    """Why features will not be scored."""
    if shards.labeled:
        return
    if count := shards.passed_over.get("json"):
        logger.warning(
            "%s: has no labels (.cls), so nothing will be scored; labels in its %d .json are taken over by "
            "tools/make_shards.py %s DEST",
            *(shards.folder, count, shards.folder),
        )
    else:
        logger.warning("%s: has no labels (.cls), so nothing will be scored", shards.folder)


def _check_window(train: ShardSet, data: Data) -> None:
    """Refuse a cache that would have to fetch shards again and again."""
    total, largest = sum(train.shards.values()), max(train.shards.values())
    fraction = min(1.0, data.window / len(train)) if data.window else 1.0
    needed = min(total, fraction * total + (AHEAD + 1) * largest) / 1e9
    if needed > data.cache_gb:
        raise UserError(
            f"data.cache_gb={data.cache_gb:g}: data.window={data.window} needs {needed:.2g} GB of "
            f"{train.folder} at a time; raise data.cache_gb, or set a smaller data.window above 0 (0 is all)"
        )


def _check_names(train: ShardSet, test: ShardSet) -> None:
    """Refuse splits in which a label means different classes."""
    if train.classes is None or test.classes is None:
        return
    for label, (one, other) in enumerate(zip_longest(train.classes, test.classes, fillvalue="no class")):
        if one != other:
            raise UserError(
                f"label {label} is {one} in {train.folder} and {other} in {test.folder}; "
                f"pack both from one folder that holds the splits, so that they name the same classes"
            )


def _classes(wanted: int | None, train: ShardSet, test: ShardSet | None) -> int:
    splits = (train,) if test is None else (train, test)
    for shards in splits:
        highest = int(shards.labels.max())
        if wanted is not None and highest >= wanted:
            raise UserError(
                f"data.num_classes={wanted}: {shards.folder} has labels up to {highest}, "
                f"so at least {highest + 1}"
            )
        if wanted is None and shards.classes is None and are_identifiers(shards.labels):
            count = len(np.unique(shards.labels))
            raise UserError(
                f"{shards.folder}: its {count} different labels go up to {highest}, as identifiers do; "
                f"tools/make_shards.py numbers them, or set data.num_classes={highest + 1} if they are right"
            )
    names = max((len(shards.classes) for shards in splits if shards.classes), default=0)
    found = max(names, *(int(shards.labels.max()) + 1 for shards in splits))
    if wanted is not None and wanted < names:
        raise UserError(f"data.num_classes={wanted}: {train.folder} names {names} classes")
    return wanted or found
