"""Whatever stands in a recipe, it trains or leaves with one line: no other exception comes out."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings

from framework.config import loading
from framework.config.recipe import Recipe
from framework.data.batch import Batch
from framework.model import recipe_network
from framework.optim import build_optimizer
from framework.runtime.errors import UserError
from tests.support.fuzzing import Tree, recipes

BASE: Tree = {
    "data": {"path": "nowhere", "image_size": 32, "workers": 0},
    "train": {"batch_size": 4, "epochs": 20},
    "optim": {"warmup_epochs": 0},
    "network": {"sync_bn": False},
    "views": {"kind": "cifar"},
}
CLASSES = 10


def told(tree: Tree) -> str:
    """What is said about a recipe, which makes two steps if nothing is."""
    try:
        recipe = load(tree)
        make_steps(recipe)
    except UserError as error:
        return str(error)
    except ValueError as error:
        if "Expected more than 1 value per channel" not in str(error):  # which a training puts in one line
            raise
    return ""


def load(tree: Tree) -> Recipe:
    with TemporaryDirectory() as folder:
        (Path(folder) / "base.yaml").write_text(yaml.safe_dump(BASE))
        file = Path(folder) / "fuzzed.yaml"
        file.write_text(yaml.safe_dump({"defaults": ["base"], **tree}))
        recipe = loading.load([str(file)])
        again = Path(folder) / "again.yaml"
        again.write_text(loading.to_yaml(recipe))
        assert loading.load([str(again)]) == recipe
        return recipe


def make_steps(recipe: Recipe) -> None:
    net = recipe_network(recipe, CLASSES)
    optim = recipe.optim
    optimizer = build_optimizer(
        net,
        name=optim.name,
        nesterov=optim.nesterov,
        trust=optim.trust,
        betas=optim.betas,
        layer_decay=optim.layer_decay,
    )
    images, size = recipe.train.batch_size, recipe.data.image_size
    for _ in range(2):
        x = torch.randn(images * net.plan.views, 3, size, size)
        batch = Batch(x, torch.arange(images) % CLASSES if net.plan.supervised else None, net.plan.views)
        net(batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    net.eval()
    net.features(x)
    if net.classifies:
        net.predict(x)


def check(tree: Tree) -> None:
    message = told(tree)
    assert "\n" not in message, message


#: Without shrinking, which repeats steps for minutes; what failed is printed as it was drawn.
FUZZ = settings(
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
    phases=[Phase.explicit, Phase.generate],
)


@given(recipes())
@settings(FUZZ, max_examples=3, derandomize=True)
def test_a_recipe_trains_or_leaves_with_one_line(tree: Tree) -> None:
    check(tree)


@pytest.mark.slow
@given(recipes())
@settings(FUZZ, max_examples=100, derandomize=True)
def test_many_recipes_train_or_leave_with_one_line(tree: Tree) -> None:
    check(tree)


@pytest.mark.soak
@given(recipes(large=True))
@settings(FUZZ, max_examples=3000)
def test_thousands_of_recipes_train_or_leave_with_one_line(tree: Tree) -> None:
    check(tree)
