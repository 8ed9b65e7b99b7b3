"""What is said about recipes that are wrong: the key, the file that has it, and what would be right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from framework.config.loading import load, to_yaml
from tests.support.recipes import fails

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
    "optim.lr=1e300": "optim.lr=1e+300: must be at most 1e+35",
    "optim.lr=nan": "optim.lr=nan: must be a finite number",
    "optim.momentum=1": "optim.momentum=1: must be at least 0 and below 1",
    "optim.betas=[0.9,1.0]": "optim.betas[1]=1.0: must be at least 0 and below 1",
    "optim.betas=[0.9]": "optim.betas=[0.9]: must be a list of 2, and has 1 entries",
    "logging.profile=[5,4]": "logging.profile=[5, 4]: the first step must not come after the last",
    "logging.profile=[-1,4]": "logging.profile[0]=-1: must be at least 0",
    "logging.profile=[5]": "logging.profile=[5]: must be a list of 2, and has 1 entries",
    "logging.profile=5": "logging.profile=5: must be a list of 2, each a whole number (at least 0)",
    "optim.layer_decay=0": "optim.layer_decay=0: must be greater than 0 and at most 1",
    "optim.layer_decay=1.5": "optim.layer_decay=1.5: must be greater than 0 and at most 1",
    "network.freeze=conv1": "network.freeze=conv1: must be a list of any number, each text",
    "method.head.pool=cls": "method.head.pool=cls: must be one of auto, token, avg, both",
    "network.cut=atom": "network.cut=atom: must be one of stage, block or a whole number (at least 1) or",
    "network.cut=0": "network.cut=0: must be one of stage, block or a whole number (at least 1) or a list",
    "optim.name=larss": "optim.name=larss: must be one of lars, sgd, adamw",
    "optim=lars": "optim=lars: must be a section with the keys name, lr, ",
    "optim.lr.x=1": "optim.lr: must be a finite number",
    "optim.warmup_epochs=21": "optim.warmup_epochs=21.0: must be at most train.epochs=20; set it, too",
    "train.epochs=0": "train.epochs=0: must be at least 1",
    "train.epochs=1.5": "train.epochs=1.5: must be a whole number",
    "train.epochs=true": "train.epochs=True: must be a whole number",
    "train.epochs=null": "train.epochs=null: must be a whole number",
    "train.precision=fp8": "train.precision=fp8: must be one of fp32, bf16, fp16",
    "engine=horovod": "engine=horovod: must be one of deepspeed, ddp, fsdp",
    "zero_stage=3": "zero_stage=3: must be 0, 1 or 2; ZeRO-3 gathers a weight for each forward and again for the "
    "backward, and local gradients need it in between: engine=fsdp shards weights, too",
    "zero_stage=true": "zero_stage=True: must be one of 0, 1, 2, 3",
    "seed=-1": "seed=-1: must be at least 0",
    "seed=99999999999999999999": "seed=99999999999999999999: must be at most 2147483647",
    "name=3": "name=3: must be text",
    "method.name=locoo": "method.name=locoo: must be one of auglocal, blockwise, bp, dfa, dgl, fa, gim",
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
    "method.head.momentum=1.5": "method.head.momentum=1.5: must be at least 0 and at most 1",
    "method.head.momentum=-0.1": "method.head.momentum=-0.1: must be at least 0 and at most 1",
    "method.head.queue=0": "method.head.queue=0: must be at least 1",
    "method.head.temperature=-1": "method.head.temperature=-1: must be greater than 0",
    "method.head.momentum_schedule=cosin": "method.head.momentum_schedule=cosin: must be one of constant, cos",
    "method.head.pred_rate=fixed": "method.head.pred_rate=fixed: must be one of scheduled, constant",
    "views.blur=[1,2]": "views.blur=[1, 2]: must be a finite number (at least 0 and at most 1) or a list",
    "method.lam_blocks.layer1=x": "method.lam_blocks: unknown key for the method chosen",
}


def test_values_in_a_dictionary_of_known_kind_are_checked(recipes: Path) -> None:
    message = fails("recipes/base.yaml", "method.name=mlaan", "method.lam_blocks.layer1=x")
    assert (
        message
        == "command line: method.lam_blocks.layer1=x: must be a list of any number, each text (in quotes)"
    )
    message = fails("recipes/base.yaml", "method.name=mlaan", "method.lam_blocks.layer1=[x,1]")
    assert message == "command line: method.lam_blocks.layer1[1]=1: must be text (in quotes)"


@pytest.mark.parametrize(
    ("key", "allowed"),
    [("method.indep_head.kind", "linear, mlp_sr"), ("method.reconstruction.lambdas", "auglocal, cifar10")],
)
def test_choices_of_a_head_are_told_with_its_key(recipes: Path, key: str, allowed: str) -> None:
    message = fails("recipes/base.yaml", "method.name=mlaan", f"{key}=x")
    assert message.startswith(f"command line: {key}=x: must be one of {allowed}")


def test_feedback_of_errors_needs_logits(recipes: Path) -> None:
    message = fails("recipes/base.yaml", "method.name=dfa", "method.head.task=contrast")
    assert message.startswith(
        "command line: method.head.task=contrast: dfa leads the error of the logits down"
    )


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
    "zeros.yaml": ("seed: 1\0\0", "recipes/zeros.yaml, character 8: broken YAML: special characters"),
    "anchor.yaml": ("optim: &a {lr: *a}\n", "recipes/anchor.yaml: leads back to itself"),
    "list.yaml": ("- seed\n", "recipes/list.yaml: "),
    "empty.yaml": ("", "recipes/empty.yaml: data.path=???: must be given"),
    "binary.yaml": ("seed: \xff", "recipes/binary.yaml: 'utf-8' codec can't decode"),
    "missing.yaml": ("defaults: [bsae]\n", "recipes/missing.yaml: defaults name recipes/bsae.yaml, which does not"),
    "text.yaml": ("defaults: base\n", "recipes/text.yaml: Invalid defaults list"),
    "circle.yaml": ("defaults: [circle]\n", "recipes/circle.yaml: leads back to itself"),
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
