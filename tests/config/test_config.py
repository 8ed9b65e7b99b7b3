"""Recipes: what they compose to."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from framework.config import methods
from framework.config.loading import load, to_yaml
from framework.config.recipe import Data, Method, Optim, Recipe, Train
from tests.support.recipes import fails


def test_a_recipe_is_a_difference_to_the_schema(recipes: Path) -> None:
    recipe = load(["recipes/base.yaml"])
    assert recipe == Recipe(
        name="base",
        run_dir="runs/base",
        method=Method("loco", methods.load("loco").Options()),
        data=Data("data/digits", prepare="digits", workers=0),
        train=Train(epochs=20, batch_size=256),
        optim=Optim(lr=1.0),
    )


def test_a_recipe_does_not_change(recipes: Path) -> None:
    recipe = load(["recipes/base.yaml"])
    for section, key in ((recipe, "seed"), (recipe.data, "path"), (recipe.views, "flip")):
        with pytest.raises(FrozenInstanceError):
            setattr(section, key, 1)


def test_overrides_go_over_the_recipe_and_that_over_its_defaults(recipes: Path) -> None:
    (recipes / "middle.yaml").write_text(
        "defaults: [base]\noptim: {lr: 2, momentum: 0.5}\ntrain: {epochs: 30}\n"
    )
    (recipes / "top.yaml").write_text("defaults: [middle]\noptim: {lr: 3e-1}\nviews: {area: [0.5, 1]}\n")
    recipe = load(["recipes/top.yaml", "train.epochs=40", "views.flip=0"])
    assert (recipe.optim.lr, recipe.optim.momentum, recipe.train.epochs) == (0.3, 0.5, 40)
    assert recipe.train.batch_size == 256 and recipe.name == "top"
    assert recipe.views.area == (0.5, 1.0) and recipe.views.flip == 0.0


def test_defaults_keep_the_place_that_hydra_gives_them(recipes: Path) -> None:
    (recipes / "a.yaml").write_text("seed: 1\noptim: {lr: 2}\n")
    (recipes / "first.yaml").write_text("defaults: [base, a, _self_]\nseed: 3\n")
    (recipes / "last.yaml").write_text("defaults: [_self_, base, a]\nseed: 3\n")
    assert [load([f"recipes/{name}.yaml"]).seed for name in ("first", "last")] == [3, 1]
    assert load(["recipes/first.yaml"]).optim.lr == 2


def test_command_line_of_the_launcher(recipes: Path) -> None:
    for argv in (
        ["--local_rank=1", "recipes/base.yaml", "seed=3"],
        ["recipes/base.yaml", "seed=3", "--local-rank", "0"],
    ):
        assert load(argv).seed == 3


def test_override_grammar(recipes: Path) -> None:
    recipe = load(
        [
            "recipes/base.yaml",
            "run_dir='a run/${name}, x=1'",
            "name=mine",
            "deepspeed.zero_optimization={overlap_comm: true}",
            "deepspeed.list=[1,2]",
            "network.args.zero_init_last=false",
            "train.max_steps=7",
            "data.path=/some/where/digits-8x8",
        ]
    )
    assert recipe.run_dir == "a run/mine, x=1"
    assert recipe.deepspeed == {"zero_optimization": {"overlap_comm": True}, "list": [1, 2]}
    assert recipe.network.args == {"zero_init_last": False}
    assert recipe.train.max_steps == 7 and recipe.data.path == "/some/where/digits-8x8"
    assert load(["recipes/base.yaml", "train.max_steps=null"]).train.max_steps is None


@pytest.mark.parametrize(
    ("text", "cut"), [("block", "block"), ("16", 16), ("[layer1.0,layer4]", ["layer1.0", "layer4"])]
)
def test_cut_by_name_number_or_list(recipes: Path, text: str, cut: object) -> None:
    recipe = load(["recipes/base.yaml", f"network.cut={text}", "network.stem_as_module=true"])
    assert recipe.network.cut == cut and recipe.network.stem_as_module
    (recipes / "saved.yaml").write_text(to_yaml(recipe))
    assert load(["recipes/saved.yaml"]) == recipe


@pytest.mark.parametrize("method", methods.names())
def test_a_saved_recipe_gives_the_same_recipe(recipes: Path, method: str) -> None:
    recipe = load(
        ["recipes/base.yaml", f"method.name={method}", "deepspeed.a.b=[1,null]", "optim.weight_decay=1e-6"]
    )
    assert type(recipe.method.options) is methods.load(method).Options
    (recipes / "saved-under-another-name.yaml").write_text(to_yaml(recipe))
    assert load(["recipes/saved-under-another-name.yaml"]) == recipe


def test_deleted_keys_are_back_at_the_schemas_default(recipes: Path) -> None:
    recipe = load(["recipes/base.yaml", "~optim", "~train.epochs=20", "~seed", "+seed=3", "++data.window=9"])
    assert recipe.optim == Optim() and recipe.train == Train(batch_size=256)
    assert (recipe.seed, recipe.data.window) == (3, 9)
    recipe = load(["recipes/base.yaml", "deepspeed={a: {b: 1}, c: 2}", "~deepspeed.a", "~deepspeed.c=2"])
    assert recipe.deepspeed == {}
    assert load(["recipes/base.yaml", "optim.lr=3", "~optim.lr", "optim.momentum=0"]).optim == Optim(
        momentum=0.0
    )


def test_interpolations_and_functions(recipes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", "/data")
    recipe = load(
        [
            "recipes/base.yaml",
            "data.path=${oc.env:WHERE}/x",
            "data.window=${train.epochs}",
            "seed=int(3.7)",
            "name='3'",
        ]
    )
    assert (recipe.data.path, recipe.data.window, recipe.seed, recipe.name) == ("/data/x", 20, 3, "3")


def test_paths_need_no_quotes(recipes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    recipe = load(["recipes/base.yaml", "data.path=~/été (1)/a=b", "run_dir=/x y/z&~"])
    assert (recipe.data.path, recipe.run_dir) == ("/home/me/été (1)/a=b", "/x y/z&~")


def test_hydra_leaves_no_state_behind(recipes: Path) -> None:
    load(["recipes/base.yaml"])
    fails("recipes/base.yaml", "lr=3")
    fails("recipes/bas.yaml")
    assert not GlobalHydra.instance().is_initialized()
