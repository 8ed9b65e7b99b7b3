"""Every recipe builds, its plan is that of the table row it claims, and each kind of it trains a step."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from framework.config import loading
from framework.config.composition import merge, recipe_files
from framework.config.recipe import Recipe
from framework.data.batch import Batch
from framework.execution import LocalNetwork
from framework.model import recipe_network
from framework.network import create, cut
from tests.support.marks import slow

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FOLDERS = ("", "cifar10", "stl10", "svhn")
PATHS = sorted(path for folder in FOLDERS for path in (RECIPES / folder).glob("*.yaml"))
NAMES = [str(path.relative_to(RECIPES).with_suffix("")) for path in PATHS]
ROW = re.compile(r"^#   ((?:MLAAN )?Table \d+(?: row \d+)?|Rebuttal) \| ([\d.]+) \|(.*)$", re.MULTILINE)
DEVIATIONS = "# Where the authors' code differs, and what follows it:\n"
SMALL = ["train.batch_size=4", "train.precision=fp32"]


def load(name: str, *overrides: str) -> Recipe:
    """A recipe of the folder."""
    return loading.load([str(RECIPES / f"{name}.yaml"), *overrides])


def rows() -> Iterator[tuple[str, str, str]]:
    """(recipe, row, overrides) of every table row that a recipe's first lines list."""
    for name in NAMES:
        for row, _, overrides in ROW.findall((RECIPES / f"{name}.yaml").read_text()):
            yield name, row, overrides.strip()


def windows(net: LocalNetwork) -> list[tuple[int, int]]:
    """First and last segment of every unit."""
    return [(unit.first, unit.last) for unit in net.plan.units]


def planned(recipe: Recipe) -> LocalNetwork:
    """The recipe's network, on images just large enough."""
    return recipe_network(recipe, recipe.data.num_classes or 10)


@pytest.mark.parametrize("name", NAMES)
def test_the_head_of_a_recipe_says_how_to_run_it(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text()
    assert f"framework/train.py recipes/{name}.yaml" in text
    assert load(name).name == Path(name).name


K = [name for name in NAMES if re.search(r"_k\d+_", name)]


@pytest.mark.parametrize(
    "name",
    [*(n for n in K if n.startswith("cifar10")), *slow([n for n in K if not n.startswith("cifar10")])],
)
def test_k_is_the_papers(name: str) -> None:
    """Modules are K of the name; where the paper counts the stem and the method does not, one less."""
    recipe = load(name)
    k = int(re.findall(r"_k(\d+)_", name)[0])
    segments = cut(create(recipe.network.name), recipe.network.cut, recipe.network.stem_as_module)
    merged = k in (16, 55) and not recipe.network.stem_as_module
    assert len(segments) == k - merged
    assert recipe.network.stem_as_module == (k in (16, 55) and recipe.method.name in ("dgl", "infopro"))


def test_the_contrastive_recipes_follow_the_papers_protocol() -> None:
    for name in NAMES:
        if not re.search(r"^(loco|gim|simclr)_(r50|pr50|sh50)_\d+ep$", name):
            continue
        recipe = load(name)
        assert (recipe.optim.name, recipe.optim.lr, recipe.optim.warmup_epochs) == ("lars", 4.8, 10)
        assert (recipe.train.batch_size, recipe.network.sync_bn, recipe.views.kind) == (4096, True, "simclr")
        assert recipe.train.epochs == int(re.findall(r"_(\d+)ep$", name)[0])
        assert recipe.method.options.head.conv_blocks == (1 if recipe.method.name == "loco" else 0)


def test_the_transformers_recipes_have_the_published_settings() -> None:
    """MoCo v3's (its CONFIG.md) and MAE's (its PRETRAIN.md) for ViT; rates are for batches of 4096."""
    found = {name: load(name) for name in ("loco_vits16_300ep", "mim_vitb16_800ep")}
    optimizers = {
        name: (o.name, o.lr, o.warmup_epochs, o.weight_decay, o.betas, o.decay)
        for name, o in ((name, recipe.optim) for name, recipe in found.items())
    }
    assert optimizers == {
        "loco_vits16_300ep": ("adamw", 1.5e-4 * 16, 40, 0.1, (0.9, 0.999), "weights"),
        "mim_vitb16_800ep": ("adamw", 1.5e-4 * 16, 40, 0.05, (0.9, 0.95), "weights"),
    }
    assert {recipe.train.batch_size for recipe in found.values()} == {4096}
    loco, mim = found.values()
    head = loco.method.options.head
    assert (head.objective, head.layers, head.temperature, head.pool) == ("mocov3", 3, 0.2, "token")
    assert loco.network.freeze == ["patch_embed"] and loco.network.args["num_heads"] == 12
    assert loco.views.area == (0.08, 1.0) and (loco.train.epochs, mim.train.epochs) == (300, 800)
    assert mim.method.options.masked == 0.75 and mim.views.area == (0.2, 1.0)


def test_the_supervised_transformer_has_the_published_settings() -> None:
    """DeiT's (Touvron et al. 2021, Table 9); the rate is for batches of 512."""
    recipe = load("dgl_vits16_300ep")
    optim, train, mixing = recipe.optim, recipe.train, recipe.mixing
    assert (optim.name, optim.lr, optim.weight_decay, optim.warmup_epochs) == ("adamw", 5e-4 * 2, 0.05, 5)
    assert (train.batch_size, train.epochs, train.label_smoothing, train.ema) == (1024, 300, 0.1, 0.99996)
    assert (mixing.mixup, mixing.cutmix, mixing.probability, mixing.switch) == (0.8, 1.0, 1.0, 0.5)
    assert mixing.mode == "batch" and recipe.views.rand_augment == "rand-m9-mstd0.5-inc1"
    assert recipe.network.args == {"drop_path_rate": 0.1}


EXPECTED = {
    "loco_r50_800ep": [(0, 1), (1, 2), (2, 3)],
    "gim_r50_800ep": [(0, 0), (1, 1), (2, 2), (3, 3)],
    "simclr_r50_800ep": [(0, 3)],
    "loco_sh50_800ep": [(0, 1), (1, 2), (2, 3)],
    "loco_pr50_100ep": [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)],
    "gim_pr50_100ep": [(i, i) for i in range(6)],
}


@pytest.mark.parametrize(
    "name", [*(n for n in EXPECTED if "_r50_" in n), *slow([n for n in EXPECTED if "_r50_" not in n])]
)
def test_contrastive_windows_are_figure_1s(name: str) -> None:
    assert windows(planned(load(name, "data.image_size=64", *SMALL))) == EXPECTED[name]


def test_mlaan_on_resnet_152_has_50_modules_in_windows_of_three() -> None:
    recipe = load("mlaan_r152", *SMALL)
    segments = cut(create("resnet152"), recipe.network.cut)
    assert len(segments) == 50 and recipe.method.options.window == 3


ROWS = list(rows())


@pytest.mark.parametrize(
    ("name", "row", "overrides"),
    [row if number % 8 == 0 else slow([row])[0] for number, row in enumerate(ROWS)],
    ids=[f"{n}-{r}" for n, r, _ in ROWS],
)
def test_a_table_row_trains_a_step(name: str, row: str, overrides: str) -> None:
    """At small size: the CIFAR networks as they are, ResNet-50 by ResNet-34."""
    size = 32 if "cifar10" in name else 64
    smaller = [] if "cifar10" in name else ["network.name=resnet34"]
    net = planned(load(name, *overrides.split(), *smaller, f"data.image_size={size}", *SMALL))
    images = torch.randn(4 * net.plan.views, 3, size, size)
    net(Batch(images, torch.arange(4), net.plan.views)).loss.backward()
    for parameter_name, parameter in net.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), parameter_name


def test_every_row_of_the_ablation_tables_is_listed() -> None:
    listed = {row for _, row, _ in ROWS}
    assert {f"Table 4 row {i}" for i in range(1, 13)} | {f"Table 5 row {i}" for i in range(1, 9)} <= listed
    assert {f"MLAAN Table 4 row {i}" for i in range(1, 5)} | {"MLAAN Table 5", "Rebuttal"} <= listed


def deviations(name: str) -> dict[str, list[str]]:
    """What the heads of a recipe and its bases say of the authors' code: topic -> overrides that follow it."""
    found: dict[str, list[str]] = {}
    for source in recipe_files(RECIPES / f"{name}.yaml"):
        _, _, listed = Path(source.where).read_text().partition(DEVIATIONS)
        for line in listed.partition("\n\n")[0].splitlines():
            topic, overrides, what = (part.strip() for part in line.removeprefix("#").split(" |", 2))
            assert what, line
            found[topic] = overrides.split()
    return found


STATED = {
    "cifar10/mlaan_r32_k16_cifar10": {"schedule", "updates", "copies", "windows"},
    "cifar10/dglstar_r32_k16_cifar10": {"schedule", "updates", "copies", "row 2 of Table 4"},
    "stl10/infopro_r110_k32_stl10": {"schedule", "classes", "contrast"},
    "svhn/infoprostar_r32_k8_svhn": {"schedule", "updates", "copies", "contrast"},
    "mlaan_r34": {"precision", "resizing", "gradients", "copies", "heads", "start"},
    "mlaan_r101": {"precision", "resizing", "gradients", "copies"},
    "loco_vits16_300ep": {"decay", "positions", "last norms", "precision"},
    "mim_vitb16_800ep": {"positions", "start"},
    "dgl_vits16_300ep": {"repetition", "erasing", "rates"},
}
#: without an override that follows it
NOT_FOLLOWED = (
    *("resizing", "gradients", "positions", "last norms", "start"),
    *("repetition", "erasing", "rates"),
)


@pytest.mark.parametrize("name", STATED)
def test_a_recipe_states_where_the_authors_code_differs(name: str) -> None:
    """Each override that follows the code is one that this recipe takes, and changes it."""
    found = deviations(name)
    assert set(found) == STATED[name]
    for topic, overrides in found.items():
        assert topic in NOT_FOLLOWED or load(name, *overrides) != load(name), topic


def test_padding_is_the_codes() -> None:
    """torchvision's RandomCrop pads with zeros; for CIFAR-10 the code reflects beforehand."""
    edges = {set_: load(f"{set_}/bp_r32_{set_}").views.edge for set_ in ("cifar10", "stl10", "svhn")}
    assert edges == {"cifar10": "reflect", "stl10": "zeros", "svhn": "zeros"}


@pytest.mark.slow
def test_locos_ablations_differ_as_the_tables_say() -> None:
    """Windows and heads of Table 4 and 5 rows, on ResNet-34, which has ResNet-50's blocks."""
    plans = {}
    for name, row, overrides in ROWS:
        if "r50" in name:
            small = ["network.name=resnet34", "data.image_size=64", *SMALL]
            plans[row] = planned(load(name, *overrides.split(), *small))
    for row in ("Table 4 row 1", "Table 4 row 3", "Table 4 row 9"):
        assert windows(plans[row]) == [(0, 3)]
    for row in ("Table 4 row 2", *(f"Table 4 row {i}" for i in (4, 5, 6, 7, 8, 10)), "Table 5 row 1"):
        assert windows(plans[row]) == [(i, i) for i in range(4)], row
    for row in ("Table 4 row 11", "Table 4 row 12", "Table 5 row 2", "Table 5 row 8"):
        assert windows(plans[row]) == [(0, 1), (1, 2), (2, 3)], row
    # 3, 4, 6 and 3 blocks: a unit is a stage and the first, or first two, of the next; the last stage stands alone.
    assert windows(plans["Table 5 row 6"]) == [(0, 3), (3, 7), (7, 13), (13, 15)]
    assert windows(plans["Table 5 row 7"]) == [(0, 4), (3, 8), (7, 14), (13, 15)]
    heads = {row: net.plan.units[-1].head for row, net in plans.items()}
    linears = {
        row: sum(isinstance(m, torch.nn.Linear) for m in head.modules()) for row, head in heads.items()
    }
    assert linears["Table 4 row 9"] == linears["Table 4 row 10"] == linears["Table 4 row 12"] == 4
    assert linears["Table 4 row 1"] == linears["Table 4 row 2"] == linears["Table 4 row 11"] == 2


#: MLAAN Table 1: error of ResNet-32 with K=8 and 16, then ResNet-110 with K=32 and 55
MLAAN_TABLE_1 = {
    "cifar10": {
        "dgl": (11.63, 14.08, 12.51, 14.45),
        "dglstar": (6.25, 6.36, 5.38, 5.42),
        "infopro": (11.51, 12.93, 12.26, 13.22),
        "infoprostar": (6.37, 6.37, 5.41, 5.60),
        "mlaan": (6.36, 6.51, 5.41, 6.02),
        "bp": (6.37, 6.37, 5.42, 5.42),
    },
    "stl10": {
        "dgl": (25.05, 27.14, 25.67, 28.16),
        "dglstar": (19.35, 19.02, 19.54, 19.66),
        "infopro": (27.32, 29.28, 28.58, 29.20),
        "infoprostar": (19.21, 19.21, 19.51, 19.24),
        "mlaan": (19.34, 19.96, 20.46, 19.66),
        "bp": (19.35, 19.35, 19.67, 19.67),
    },
    "svhn": {
        "dgl": (4.83, 5.05, 5.12, 5.36),
        "dglstar": (2.79, 2.73, 2.78, 2.90),
        "infopro": (5.61, 5.97, 5.89, 6.11),
        "infoprostar": (2.97, 2.95, 2.87, 2.90),
        "mlaan": (2.85, 2.82, 2.79, 2.89),
        "bp": (2.99, 2.99, 2.92, 2.92),
    },
}
K = (("r32", 8), ("r32", 16), ("r110", 32), ("r110", 55))
#: table -> recipe -> what the first line must say; detection (Tables 2 and 3) starts from the recipes of its column
OTHER_TABLES = {
    "MLAAN Table 2": {
        "bp_r34": "25.38/7.90",
        "mlaan_r34": "25.31/7.88",
        "bp_r101": "22.03/5.93",
        "mlaan_r101": "21.69/5.72",
        "bp_r152": "21.60/5.92",
        "mlaan_r152": "21.34/5.74",
    },
    "LoCo Table 1": {
        "simclr_r50_800ep": "69.8",
        "gim_r50_800ep": "64.7",
        "loco_r50_800ep": "69.5",
        "simclr_sh50_800ep": "69.1",
        "gim_sh50_800ep": "63.5",
        "loco_sh50_800ep": "69.3",
    },
    "LoCo Table 2": {"simclr_sh50_100ep": "32.5", "gim_sh50_100ep": "27.3", "loco_sh50_100ep": "31.8"},
    "LoCo Table 7": {"simclr_pr50_100ep": "66.8", "gim_pr50_100ep": "52.6", "loco_pr50_100ep": "66.6"},
}


def claims() -> Iterator[tuple[str, str, str]]:
    """(table, recipe, number) of the tables whose rows are recipes of their own."""
    for data, methods in MLAAN_TABLE_1.items():
        for method, errors in methods.items():
            for (network, k), error in zip(K, errors, strict=True):
                modules = "" if method == "bp" else f"_k{k}"
                name = f"{data}/{method}_{network}{modules}_{data}"
                yield "MLAAN Table 1", name, f"{error:.2f}"
    for table, recipes in OTHER_TABLES.items():
        for name, number in recipes.items():
            yield table, name, number


def test_every_row_of_the_other_tables_has_a_recipe_that_says_so() -> None:
    wrong = []
    for table, name, number in claims():
        path = RECIPES / f"{name}.yaml"
        head = path.read_text().splitlines()[0] if path.exists() else ""
        if not re.search(rf"(?<![\d.]){re.escape(number)}(?![\d])", head) or table.split()[-1] not in head:
            wrong.append((table, name, number))
    assert wrong == []


@pytest.mark.slow
def test_no_recipe_repeats_its_bases() -> None:
    for name in NAMES:
        own = OmegaConf.create((RECIPES / f"{name}.yaml").read_text())
        bases = OmegaConf.create(_merged(RECIPES / name, own.pop("defaults", [])))
        for key in _leaves(OmegaConf.to_container(own)):
            assert OmegaConf.select(bases, key) != OmegaConf.select(own, key), (name, key)


def _leaves(tree: Any, prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _merged(recipe: Path, defaults: list[str]) -> Any:
    trees = [
        source.tree for default in defaults for source in recipe_files(recipe.parent / f"{default}.yaml")
    ]
    return merge({}, *trees)
