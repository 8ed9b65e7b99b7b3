"""Recipes: what they compose to, and what is said about those that don't."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from framework.config.loading import load, to_yaml
from framework.config.recipe import Recipe
from framework.local import methods
from framework.runtime.errors import UserError

BASE = """
data: {path: data/digits, source: digits, workers: 0}
train: {epochs: 20, batch_size: 256}
optim: {lr: 1.0}
"""


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder ``recipes`` below the working directory with ``base.yaml`` in it."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "base.yaml").write_text(BASE)
    return folder


def fails(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        load(argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_recipe_is_a_difference_to_the_schema(recipes: Path) -> None:
    recipe = load(["recipes/base.yaml"])
    expected = Recipe(name="base", run_dir="runs/base")
    expected.method.options = methods.load("loco").Options()
    expected.data.path, expected.data.source, expected.data.workers = "data/digits", "digits", 0
    expected.train.epochs, expected.train.batch_size, expected.optim.lr = 20, 256, 1.0
    assert recipe == expected


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


def test_options_of_the_method_that_is_chosen_last(recipes: Path) -> None:
    (recipes / "loco.yaml").write_text(
        "defaults: [base]\nmethod: {name: loco, window: 3, head: {conv_blocks: 2}}\n"
    )
    options = load(["recipes/loco.yaml", "method.head.temperature=0.5"]).method.options
    assert (options.window, options.head.conv_blocks, options.head.temperature) == (3, 2, 0.5)
    message = fails("recipes/loco.yaml", "method.name=gim")
    assert message.startswith("recipes/loco.yaml: method.window=3: unknown key for the method chosen")


UNKNOWN = {
    "optim.lrr=1": "optim.lr",
    "lr=1": "optim.lr",
    "batch_size=1": "train.batch_size",
    "train.batch=1": "train.batch_size",
    "optm.lr=1": "optim",
    "data.image_sz=1": "data.image_size",
    "views.aera=[0,1]": "views.area",
    "method.windw=2": "method.window",
    "method.head.conv=1": "method.head.conv_blocks",
    "network.chanels_last=true": "network.channels_last",
    "optim.zero_stage=2": "zero_stage",
}


@pytest.mark.parametrize("override", UNKNOWN)
def test_an_unknown_override_names_the_nearest_key(recipes: Path, override: str) -> None:
    key = override.partition("=")[0]
    message = fails("recipes/base.yaml", override)
    assert re.match(rf"command line: {re.escape(key)}\b|command line: optm: ", message)
    assert "unknown key" in message and message.endswith(f"the nearest is {UNKNOWN[override]}")


def test_an_unknown_key_is_found_in_the_file_that_has_it(recipes: Path) -> None:
    (recipes / "typo.yaml").write_text("defaults: [base]\nevaluate: {neighbors: 3}\n")
    (recipes / "child.yaml").write_text("defaults: [typo]\nseed: 1\n")
    message = "recipes/typo.yaml: evaluate.neighbors=3: unknown key; the nearest is evaluate.neighbors"
    assert fails("recipes/child.yaml") == message
    (recipes / "hydra.yaml").write_text("defaults: [base]\nhydra: {run: {dir: x}}\n")
    assert fails("recipes/hydra.yaml").startswith("recipes/hydra.yaml: hydra: unknown key")
    (recipes / "dots.yaml").write_text("defaults: [base]\noptim.lr: 3\n")
    assert "optim.lr=3: a file has no dotted keys" in fails("recipes/dots.yaml")


WRONG = {
    "optim.lr=-1": "optim.lr=-1: must be greater than 0",
    "optim.lr=fast": "optim.lr=fast: must be a finite number",
    "optim.lr=nan": "optim.lr=nan: must be a finite number",
    "optim.momentum=1": "optim.momentum=1: must be at least 0 and below 1",
    "network.cut=atom": "network.cut=atom: must be one of stage, block or a whole number (at least 1) or",
    "network.cut=0": "network.cut=0: must be one of stage, block or a whole number (at least 1) or a list",
    "optim.name=larss": "optim.name=larss: must be one of lars, sgd, adamw",
    "optim=lars": "optim=lars: must be a section with the keys name, lr, ",
    "optim.lr.x=1": "optim.lr: must be a finite number",
    "optim.warmup_epochs=21": "optim.warmup_epochs=21.0: must be at most train.epochs=20",
    "train.epochs=0": "train.epochs=0: must be at least 1",
    "train.epochs=1.5": "train.epochs=1.5: must be a whole number",
    "train.epochs=true": "train.epochs=True: must be a whole number",
    "train.epochs=null": "train.epochs=null: must be a whole number",
    "train.precision=fp8": "train.precision=fp8: must be one of fp32, bf16, fp16",
    "engine=horovod": "engine=horovod: must be one of deepspeed, ddp, fsdp",
    "zero_stage=3": "zero_stage=3: must be one of 0, 1, 2",
    "zero_stage=true": "zero_stage=True: must be one of 0, 1, 2",
    "seed=-1": "seed=-1: must be at least 0",
    "name=3": "name=3: must be text",
    "method.name=locoo": "method.name=locoo: must be one of auglocal, bp, dgl, gim, hpff, infopro, loco",
    "method=loco": "method=loco: must be a section with the key name",
    "method.head.objective=infonc": "method.head.objective=infonc: must be one of infonce, ",
    "method.head.dim=wide": "method.head.dim=wide: must be a whole number",
    "views.area=[0.1]": "views.area=[0.1]: must be a list of 2, and has 1 entries",
    "views.area=[0.1,x]": "views.area[1]=x: must be a finite number",
    "views.area=[1,0.1]": "views: area must be",
    "data.num_classes=1.5": "data.num_classes=1.5: must be a whole number",
    "views.area={a: 1}": "views.area: must be a list of 2, each a finite number (greater than 0)",
    "deepspeed=[1]": "deepspeed=[1]: must be a section",
    "run_dir=${nme}": "run_dir=${...}: Interpolation key 'nme' not found",
    "run_dir": "run_dir: write key=value",
    "run_dir='a": "run_dir='a: quote the value, and that from the shell: \"key='value'\"",
    "method.module=1": "method.module=1: unknown key for the method chosen",
    "~optim": "~optim: write key=value with one value",
    "optim.lr=1,2": "optim.lr=1,2: write key=value with one value; a list is key=[a,b]",
}


def test_paths_need_no_quotes(recipes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    recipe = load(["recipes/base.yaml", "data.path=~/été (1)/a=b", "run_dir=/x y/z&~"])
    assert (recipe.data.path, recipe.run_dir) == ("/home/me/été (1)/a=b", "/x y/z&~")


@pytest.mark.parametrize(
    ("key", "allowed"),
    [("method.indep_head.kind", "linear, mlp_sr"), ("method.reconstruction.lambdas", "auglocal, cifar10")],
)
def test_choices_of_a_head_are_told_with_its_key(recipes: Path, key: str, allowed: str) -> None:
    message = fails("recipes/base.yaml", "method.name=mlaan", f"{key}=x")
    assert message.startswith(f"command line: {key}=x: must be one of {allowed}")


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_value_is_told_what_would_be_right(recipes: Path, override: str) -> None:
    assert fails("recipes/base.yaml", override).startswith(f"command line: {WRONG[override]}")


def test_a_wrong_value_is_found_in_the_file_that_set_it_last(recipes: Path) -> None:
    (recipes / "child.yaml").write_text("defaults: [base]\ntrain: {epochs: -3}\noptim: {lr: x}\n")
    assert (
        fails("recipes/child.yaml", "optim.lr=1") == "recipes/child.yaml: train.epochs=-3: must be at least 1"
    )
    assert fails("recipes/child.yaml", "train.epochs=1").startswith("recipes/child.yaml: optim.lr=x: ")


FILES = {
    "required.yaml": ("seed: 1\n", "recipes/required.yaml: data.path=???: must be given"),
    "broken.yaml": ("seed: 1\ntrain: [1,\nname: x\n", "recipes/broken.yaml, line 4: broken YAML: "),
    "tab.yaml": ("train:\n\tepochs: 3\n", "recipes/tab.yaml, line 2: broken YAML: "),
    "twice.yaml": ("seed: 1\nseed: 2\n", "recipes/twice.yaml, line 2: broken YAML: found duplicate key seed"),
    "list.yaml": ("- seed\n", "recipes/list.yaml: "),
    "empty.yaml": ("", "recipes/empty.yaml: data.path=???: must be given"),
    "binary.yaml": ("seed: \xff", "recipes/binary.yaml: 'utf-8' codec can't decode"),
    "missing.yaml": ("defaults: [bsae]\n", "recipes/missing.yaml: defaults name bsae.yaml, which does not"),
    "text.yaml": ("defaults: base\n", "recipes/text.yaml: Invalid defaults list"),
    "circle.yaml": ("defaults: [circle]\n", "recipes/circle.yaml: the defaults lead back"),
    "nothing.yaml": ("defaults: [base]\noptim:\n", "recipes/nothing.yaml: optim=null: must be a section"),
    "brace.yaml": ("defaults: [base]\nname: ${x\n", "recipes/brace.yaml: "),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_is_named(recipes: Path, name: str) -> None:
    text, message = FILES[name]
    (recipes / name).write_bytes(text.encode("latin-1"))
    assert fails(f"recipes/{name}").startswith(message)
    if name not in (
        "required.yaml",
        "empty.yaml",
        "nothing.yaml",
    ):  # and the same if another recipe builds on it
        (recipes / "above.yaml").write_text(f"defaults: [{name.removesuffix('.yaml')}]\n")
        assert fails("recipes/above.yaml").startswith("recipes/")


def test_a_missing_recipe_lists_its_neighbors(recipes: Path) -> None:
    assert fails("recipes/bas.yaml") == "recipes/bas.yaml: no such recipe; recipes/ has base.yaml"
    (recipes / "child.yaml").write_text("defaults: [bsae]\n")
    assert "bsae.yaml, which does not exist; recipes/ has base.yaml" in fails("recipes/child.yaml")
    (recipes / "child.yaml").unlink()
    assert fails("recipes/base") == "recipes/base: no such recipe; recipes/ has base.yaml"
    assert fails("recipe/base.yaml") == "recipe/base.yaml: no such recipe; recipe/ has no recipes"
    assert "no such recipe" in fails("recipes")


def test_hydra_leaves_no_state_behind(recipes: Path) -> None:
    load(["recipes/base.yaml"])
    fails("recipes/base.yaml", "lr=3")
    fails("recipes/bas.yaml")
    assert not GlobalHydra.instance().is_initialized()
