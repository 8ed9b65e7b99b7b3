"""Recipes: what they compose to, and what is said about those that don't."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from framework.config import methods
from framework.config.loading import load, to_yaml
from framework.config.recipe import Data, Method, Optim, Recipe, Train
from framework.local import methods as local_methods
from framework.runtime.errors import UserError

BASE = """
data: {path: data/digits, prepare: digits, workers: 0}
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


def test_options_of_the_method_that_is_chosen_last(recipes: Path) -> None:
    (recipes / "loco.yaml").write_text(
        "defaults: [base]\nmethod: {name: loco, window: 3, head: {conv_blocks: 2}}\n"
    )
    options = load(["recipes/loco.yaml", "method.head.temperature=0.5"]).method.options
    assert (options.window, options.head.conv_blocks, options.head.temperature) == (3, 2, 0.5)


OTHER = {  # over a recipe of LoCo with these options
    "null first": (["method=null", "method.name=gim"], ""),
    "deleted first": (["~method", "method.name=gim"], ""),
    "another name": (
        ["method.name=gim"],
        "recipes/loco.yaml: dropped method.window, method.head: set for method.name=loco, and it is gim now\n",
    ),
}


@pytest.mark.parametrize("case", OTHER)
def test_options_for_another_method_are_dropped_and_named(
    recipes: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, printed = OTHER[case]
    (recipes / "loco.yaml").write_text(
        "defaults: [base]\nmethod: {name: loco, window: 3, head: {conv_blocks: 2}}\n"
    )
    recipe = load(["recipes/loco.yaml", *overrides, "method.head.temperature=0.5"])
    head = recipe.method.options.head
    assert (recipe.method.name, head.conv_blocks, head.temperature) == ("gim", 0, 0.5)
    assert capsys.readouterr().err == printed


def test_an_option_means_the_method_of_its_own_file_or_of_those_below(
    recipes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file without a name means what is selected below it, or else above it."""
    (recipes / "options.yaml").write_text("method: {window: 3}\n")
    (recipes / "loco.yaml").write_text("defaults: [base, options]\nmethod: {name: loco}\n")
    (recipes / "wider.yaml").write_text("defaults: [loco]\nmethod: {window: 4}\n")
    (recipes / "mlaan.yaml").write_text("defaults: [wider]\nmethod: {name: mlaan, w_casc: 0.5}\n")
    assert load(["recipes/wider.yaml"]).method.options.window == 4
    assert capsys.readouterr().err == ""
    options = load(["recipes/mlaan.yaml"]).method.options
    assert (options.window, options.w_casc) == (2, 0.5)
    assert capsys.readouterr().err.splitlines() == [
        f"recipes/{name}.yaml: dropped method.window: set for method.name=loco, and it is mlaan now"
        for name in ("options", "wider")
    ]
    assert load(["recipes/mlaan.yaml", "method.name=loco"]).method.options.window == 4
    assert "recipes/mlaan.yaml: dropped method.w_casc: set for" in capsys.readouterr().err


def test_an_option_on_the_command_line_must_be_one_of_the_method(recipes: Path) -> None:
    message = fails("recipes/base.yaml", "method.window=3", "method.name=gim")
    assert message.startswith("command line: method.window=3: unknown key for the method chosen")


def test_arguments_for_another_network_are_dropped_and_named(
    recipes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (recipes / "args.yaml").write_text("network: {cut: block, args: {zero_init_last: false}}\n")
    (recipes / "wide.yaml").write_text("defaults: [base, args]\nnetwork: {name: resnet34}\n")
    assert load(["recipes/wide.yaml"]).network.args == {"zero_init_last": False}
    assert capsys.readouterr().err == ""
    network = load(["recipes/wide.yaml", "network.name=resnet18", "network.args.stem_width=32"]).network
    assert (network.cut, network.args) == ("block", {"stem_width": 32})
    assert capsys.readouterr().err == (
        "recipes/args.yaml: dropped network.args: set for network.name=resnet34, and it is resnet18 now\n"
    )


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
    (recipes / "typo.yaml").write_text("defaults: [base]\nevaluate: {neighbor: 3}\n")
    (recipes / "child.yaml").write_text("defaults: [typo]\nseed: 1\n")
    message = "recipes/typo.yaml: evaluate.neighbor=3: unknown key; the nearest is evaluate.neighbors"
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
    "optim.lr=1,2": "optim.lr=1,2: write key=value with one value; a list is key=[a,b]",
    "seed=range(1,9)": "seed=range(1,9): write key=value with one value; a list is key=[a,b]",
    "seed@optim=1": "seed@optim=1: write section.key=value; recipes have no packages and config groups",
    "base/digits=x": "base/digits=x: write section.key=value; recipes have no packages and config groups",
    "~optim.lrr": "~optim.lrr: unknown key; the nearest is optim.lr",
    "~network.args.x": "~network.args.x: nothing sets it",
    "~optim.lr=3": "~optim.lr=3: optim.lr is 1.0",
    "~deepspeed.a": "~deepspeed.a: nothing sets it",
    "method.head=null": "method.head=null: must be a section with the keys conv_blocks, dec_block, ",
    "network.cut=[layer1,2]": "network.cut=['layer1', 2]: must be one of stage, block or a whole number",
    "method.lam_blocks.layer1=x": "method.lam_blocks: unknown key for the method chosen",
}


def test_braces_that_a_shell_expanded_are_refused(recipes: Path) -> None:
    shards = [f"data.train=a-{i:03d}.tar" for i in range(3)]
    message = fails("recipes/base.yaml", "seed=1", *shards)
    assert message == (
        "command line: data.train=a-000.tar data.train=a-001.tar: sets data.train twice; leave one out, or, if a shell "
        "made them of braces, quote these: 'data.train=a-{000..127}.tar'"
    )
    assert load(["recipes/base.yaml", "data.train=a-{000..127}.tar"]).data.train == "a-{000..127}.tar"
    assert load(["recipes/base.yaml", "seed=1", "seed=1"]).seed == 1
    assert load(["recipes/base.yaml", "seed=1", "optim.lr=1", "seed=2"]).seed == 2  # over a script's default
    assert load(["recipes/base.yaml", "deepspeed={a: 1}", "deepspeed={b: 2}"]).deepspeed == {"a": 1, "b": 2}


def test_values_in_a_dictionary_of_known_kind_are_checked(recipes: Path) -> None:
    message = fails("recipes/base.yaml", "method.name=mlaan", "method.lam_blocks.layer1=x")
    assert (
        message
        == "command line: method.lam_blocks.layer1=x: must be a list of any number, each text (in quotes)"
    )
    message = fails("recipes/base.yaml", "method.name=mlaan", "method.lam_blocks.layer1=[x,1]")
    assert message == "command line: method.lam_blocks.layer1[1]=1: must be text (in quotes)"


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
    "missing.yaml": ("defaults: [bsae]\n", "recipes/missing.yaml: defaults name recipes/bsae.yaml, which does not"),
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


def test_files_are_named_by_their_shortest_path(recipes: Path) -> None:
    (recipes / "folder").mkdir()
    (recipes / "folder" / "child.yaml").write_text("defaults: [../base, ../folder/wrong]\n")
    (recipes / "folder" / "wrong.yaml").write_text("seed: x\n")
    assert fails("recipes/folder/child.yaml").startswith("recipes/folder/wrong.yaml: seed=x: must be a whole")
    (recipes / "folder" / "wrong.yaml").write_text("seed: [\n")
    assert fails("recipes/folder/child.yaml").startswith("recipes/folder/wrong.yaml, line 2: broken YAML")
    (recipes / "folder" / "wrong.yaml").unlink()
    assert "defaults name recipes/folder/wrong.yaml, which does not" in fails("recipes/folder/child.yaml")


OLD = {
    "data.share=0.5": "data.fraction=0.5",
    "data.source=shards": "data.prepare=none",
    "evaluate.neighbours=3": "evaluate.neighbors=3",
    "views.centre=1.0": "views.center=1.0",
    "views.greyscale=0.1": "views.grayscale=0.1",
    "method.lam_weights=single_pulled": "method.lam_weights=trained_and_pulled",
}


@pytest.mark.parametrize("old", OLD)
def test_an_old_name_is_answered_with_the_new_one(recipes: Path, old: str) -> None:
    message = f"{old}: has another name now: {OLD[old]}"
    assert fails("recipes/base.yaml", "method.name=mlaan", old) == f"command line: {message}"
    key, value = old.split("=")
    section, name = key.split(".")
    (recipes / "mlaan.yaml").write_text("defaults: [base]\nmethod: {name: mlaan}\n")
    (recipes / "old.yaml").write_text(f"defaults: [mlaan]\n{section}: {{{name}: {value}}}\n")
    assert fails("recipes/old.yaml") == f"recipes/old.yaml: {message}"


def test_the_recipe_in_a_run_folder_may_have_old_names(
    recipes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = load(["recipes/base.yaml", "method.name=mlaan", *OLD.values(), "data.prepare=digits"])
    text = to_yaml(now)
    for old, new in OLD.items():
        (key, value), (new_key, new_value) = old.split("="), new.split("=")
        name, new_name = (k.split(".")[1] for k in (key, new_key))
        text = re.sub(
            rf"^(  |    ){new_name}: {re.escape(new_value)}$", rf"\1{name}: {value}", text, flags=re.M
        )
    text = text.replace("  prepare: digits", "  source: digits")
    assert text.count("neighbours: 3") == 1 and "prepare" not in text and "single_pulled" in text
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text(text)
    assert load(["run/recipe.yaml"]) == now
    assert capsys.readouterr() == ("", "")


def test_hydra_leaves_no_state_behind(recipes: Path) -> None:
    load(["recipes/base.yaml"])
    fails("recipes/base.yaml", "lr=3")
    fails("recipes/bas.yaml")
    assert not GlobalHydra.instance().is_initialized()


PLAIN = """
from dataclasses import dataclass, field
from framework.config.schema import PositiveInt

@dataclass
class Head:
    width: PositiveInt = 8

@dataclass
class Options:
    window: PositiveInt = 2
    head: Head = field(default_factory=Head)

def plan(network, options):
    ...
"""


@pytest.fixture
def method_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """Writes ``mine.py`` of a folder of methods; returns its path."""
    folder = tmp_path / "methods"
    folder.mkdir()
    monkeypatch.setattr(methods, "FOLDER", folder)
    monkeypatch.setattr(local_methods, "__path__", [str(folder)])

    def write(text: str) -> Path:
        (folder / "mine.py").write_text(text)
        monkeypatch.delitem(sys.modules, "framework.local.methods.mine", raising=False)
        importlib.invalidate_caches()
        methods.load.cache_clear()
        return folder / "mine.py"

    return write


def test_a_method_of_plain_dataclasses(recipes: Path, method_file: Callable[[str], Path]) -> None:
    """As users write it: the base class is added, and every section in it is as strict as our own."""
    method_file(PLAIN)
    recipe = load(["recipes/base.yaml", "method.name=mine", "method.head.width=3"])
    options = recipe.method.options
    assert (options.window, options.head.width, options.execution.kind) == (2, 3, "synchronous")
    Path("recipes/saved.yaml").write_text(to_yaml(recipe))
    assert load(["recipes/saved.yaml"]).method == recipe.method
    argv = ("recipes/base.yaml", "method.name=mine")
    assert fails(*argv, "method.head.width=0").endswith("method.head.width=0: must be at least 1")
    assert fails(*argv, "method.head.widht=3").endswith("the nearest is method.head.width")
    assert fails(*argv, "method.window=2.0").endswith(
        "method.window=2.0: must be a whole number (at least 1)"
    )


BROKEN_METHODS = {
    "no options": (PLAIN.replace("class Options", "class Settings"), ": must define a dataclass Options"),
    "no dataclass": ("class Options: ...\ndef plan(): ...\n", ": must define a dataclass Options"),
    "no default": (PLAIN.replace("PositiveInt = 2", "PositiveInt"), ": Options: window must have a default"),
    "a strange type": (
        PLAIN.replace("window: PositiveInt", "window: slice"),
        ": Options: Unable to generate pydantic-core schema for <class 'slice'>",
    ),
    "no plan": (PLAIN.replace("def plan", "def plans"), ": must define a function plan(network, options)"),
    "an error": (PLAIN + "\nx = y\n", ", line 17: can't be imported: NameError: name 'y' is not defined"),
    "no Python": (PLAIN + "\nx = (\n", ", line 17: can't be imported: '(' was never closed"),
    "no module": (
        "import nowhere\n",
        ", line 1: can't be imported: ModuleNotFoundError: No module named 'nowhere'",
    ),
}


@pytest.mark.parametrize("case", BROKEN_METHODS)
def test_a_broken_method_file_is_named(recipes: Path, method_file: Callable[[str], Path], case: str) -> None:
    text, message = BROKEN_METHODS[case]
    path = method_file(text)
    assert fails("recipes/base.yaml", "method.name=mine").startswith(f"{path}{message}")
