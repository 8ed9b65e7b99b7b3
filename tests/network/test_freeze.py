"""Parameters that a recipe leaves as they are initialized."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from framework.config.recipe import Data, Method, Network, Recipe
from framework.local.heads import Projection
from framework.local.methods import gim
from framework.model import recipe_network
from framework.optim import build_optimizer
from framework.runtime.errors import UserError
from tests.support import networks

NAME, SMALL = networks.TRANSFORMERS["vit"]
HEAD = Projection(objective="mocov3", pool="token", proj_hidden=16, dim=8, pred_hidden=8)
RECIPE = Recipe(
    name="frozen",
    network=Network(NAME, "block", sync_bn=False, args={"img_size": 16, **SMALL}, freeze=["patch_embed"]),
    method=Method("gim", gim.Options(head=HEAD)),
    data=Data(path="nowhere", image_size=16),
)


def test_what_is_frozen_stays_and_the_rest_learns() -> None:
    """MoCo v3's fixed patch projection; its teacher has the same."""
    net = recipe_network(RECIPE, 0).double()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = build_optimizer(net, name="adamw", weight_decay=0.1)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    for seed in range(2):
        net(networks.batch(net, seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    same = {name for name, p in net.named_parameters() if torch.equal(p, before[name])}
    assert same == {"backbone.patch_embed.proj.weight", "backbone.patch_embed.proj.bias"}
    assert net.teacher is not None
    for name in ("weight", "bias"):
        path = f"patch_embed.proj.{name}"
        assert torch.equal(net.teacher.backbone.get_buffer(path), net.backbone.get_parameter(path))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["patch"], "network.freeze: VisionTransformer has no parameters under patch"),
        (["blocks.2"], "network.freeze: nothing in segment blocks.2 would be trained"),
    ],
)
def test_what_can_not_be_frozen_is_one_line(names: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe_network(replace(RECIPE, network=replace(RECIPE.network, freeze=names)), 0)
