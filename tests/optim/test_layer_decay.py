"""AdamW's betas, and learning rates by layer: against timm's own groups."""

from __future__ import annotations

import pytest
import torch
from timm import create_model
from timm.optim import param_groups_layer_decay
from torch import nn

from framework.engines.base import set_learning_rate
from framework.execution import LocalNetwork
from framework.model import local_network
from framework.network import create
from framework.optim import build_optimizer, parameter_groups
from framework.runtime.errors import UserError
from tests.support.marks import slow
from tests.support.networks import CLASSES

VIT = {"img_size": 16, "patch_size": 4, "depth": 4, "embed_dim": 24, "num_heads": 2}
SWIN = {"img_size": 32, "window_size": 2, "depths": (2, 1), "num_heads": (1, 2), "embed_dim": 16}
#: name -> side of images, timm's name, arguments
NETWORKS = {
    "class token": (16, "vit_tiny_patch16_224", VIT),
    "mean": (16, "vit_tiny_patch16_224", VIT | {"global_pool": "avg", "reg_tokens": 2}),
    "swin": (32, "swin_tiny_patch4_window7_224", SWIN),
    "resnet": (32, "resnet18", {}),
}


def scales(groups: list[dict[str, object]], net: nn.Module) -> dict[str, tuple[float, float]]:
    """Name -> factor of the learning rate, weight decay."""
    names = {parameter: name for name, parameter in net.named_parameters()}
    return {
        names[p]: (float(g["lr_scale"]), float(g["weight_decay"]))  # type: ignore[arg-type]
        for g in groups
        for p in g["params"]  # type: ignore[attr-defined]
    }


def cut(name: str, method: str, at: str) -> LocalNetwork:
    side, network, arguments = NETWORKS[name]
    return local_network(
        create(network, **arguments), method, image_size=side, num_classes=CLASSES, cut=at
    ).train()


@pytest.mark.parametrize(
    ("name", "method", "at"),
    [
        ("class token", "bp", "stage"),
        ("swin", "dgl", "block"),
        *slow([("class token", "dgl", "block"), ("swin", "bp", "stage")]),
        *slow([(name, *how) for name in ("mean", "resnet") for how in (("bp", "stage"), ("dgl", "block"))]),
    ],
)
def test_rates_and_decay_are_those_of_timms_groups_however_the_network_is_cut(
    name: str, method: str, at: str
) -> None:
    _, network, arguments = NETWORKS[name]
    whole = create_model(network, num_classes=CLASSES, **arguments)
    theirs = scales(
        param_groups_layer_decay(
            whole,
            weight_decay=0.1,
            layer_decay=0.5,
            no_weight_decay_list=getattr(whole, "no_weight_decay", set)(),
        ),
        whole,
    )
    net = cut(name, method, at)
    ours = scales(parameter_groups(net, 0.1, layer_decay=0.5), net)
    backbone = {name.removeprefix("backbone."): v for name, v in ours.items() if name.startswith("backbone.")}
    classifier = whole.pretrained_cfg["classifier"]
    assert backbone == {name: v for name, v in theirs.items() if not name.startswith(f"{classifier}.")}
    heads = {scale for name, (scale, _) in ours.items() if name.startswith("heads.")}
    assert heads == {theirs[f"{classifier}.weight"][0]} == {1.0}
    assert len({scale for scale, _ in backbone.values()}) >= 4


def test_a_step_is_smaller_by_the_layers_factor() -> None:
    """SGD without momentum: the step is the rate times the gradient, which is 1 everywhere."""
    net = cut("class token", "bp", "block")
    optimizer = build_optimizer(net, name="sgd", momentum=0.0, weight_decay=0.0, layer_decay=0.5)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    set_learning_rate(optimizer, 0.25)
    optimizer.step()
    factors = {
        "backbone.cls_token": 5,
        "backbone.patch_embed.proj.weight": 5,
        "backbone.blocks.0.norm1.weight": 4,
        "backbone.blocks.3.mlp.fc1.weight": 1,
        "backbone.norm.bias": 1,  # timm counts it to the last block
        "heads.blocks_3.trunk.1.weight": 0,
    }
    for name, layers in factors.items():
        step = before[name] - net.get_parameter(name)
        assert torch.allclose(step, torch.full_like(step, 0.25 * 0.5**layers), rtol=1e-5), name


def test_adamw_has_the_betas_of_the_recipe() -> None:
    net = nn.Linear(1, 1, bias=False)
    optimizer = build_optimizer(net, name="adamw", betas=(0.5, 0.25), weight_decay=0.0)
    for gradient in (1.0, 3.0):
        net.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
    state = optimizer.state[net.weight]
    assert float(state["exp_avg"]) == 0.5 * 0.5 * 1 + 0.5 * 3
    assert float(state["exp_avg_sq"]) == 0.25 * 0.75 * 1 + 0.75 * 9


def test_a_network_that_tells_no_layers_has_no_layer_decay() -> None:
    with pytest.raises(UserError, match=r"optim.layer_decay=0.5: the network must say which layers it has"):
        build_optimizer(nn.Linear(2, 2), name="sgd", layer_decay=0.5)
