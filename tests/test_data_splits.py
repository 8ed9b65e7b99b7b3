"""The splits of a recipe: what their labels mean, and which of them are there."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_data_loader import grey_png

from framework.data.shards import write_shards
from framework.data.splits import Splits
from framework.errors import UserError
from framework.recipe import Data, Recipe


def write(folder: Path, classes: list[str] | None) -> None:
    write_shards(((f"{i}", grey_png(i), "png", i % 2) for i in range(4)), folder, classes)


def opened(path: Path | str, **data: object) -> Splits:
    return Splits.open(Recipe(name="test", data=Data(path=str(path), **data)))


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["bee", "cat"], "label 0 is ant in .*train and bee in .*test; pack both"),
        (["ant", "bee"], "label 2 is cat in .*train and no class in .*test"),
        (["ant", "bee", "cat", "dog"], "label 3 is no class in .*train and dog in .*test"),
    ],
)
def test_a_label_means_one_class(tmp_path, names, problem):
    write(tmp_path / "train", ["ant", "bee", "cat"])
    write(tmp_path / "test", names)
    with pytest.raises(UserError, match=problem):
        opened(tmp_path)


@pytest.mark.parametrize("names", [["ant", "bee", "cat"], None])
def test_a_split_may_name_the_same_classes_or_none(tmp_path, names):
    write(tmp_path / "train", ["ant", "bee", "cat"])
    write(tmp_path / "test", names)
    assert opened(tmp_path).num_classes == 3
