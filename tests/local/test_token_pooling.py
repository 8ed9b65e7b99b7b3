"""What heads see of a transformer's tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from framework.config.schema import build
from framework.data.batch import Batch
from framework.execution import LocalNetwork
from framework.local.heads import Classifier, Projection
from framework.local.methods import dgl, gim, loco
from framework.model import local_network
from framework.network import create
from framework.runtime.errors import UserError
from tests.support import networks

SMALL = {"proj_hidden": 16, "dim": 8}


def network(name: str, head: Projection, method: str = "gim", **arguments: Any) -> LocalNetwork:
    backbone = networks.transformer(name, 16, **arguments) if name in networks.TRANSFORMERS else create(name)
    options = {"gim": gim, "loco": loco}[method].Options(head=head)  # type: ignore[attr-defined]
    return local_network(backbone, method, options, image_size=16).double().eval()


def seen(net: LocalNetwork, unit: int) -> tuple[Tensor, Tensor]:
    """A segment's output, and what the first linear layer of the head on it gets."""
    found: list[Tensor] = []
    head = net.plan.units[unit].head
    linear = next(module for module in head.modules() if isinstance(module, nn.Linear))
    linear.register_forward_hook(lambda module, inputs, output: found.append(inputs[0]))
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        for segment in net.segments[: unit + 1]:
            x = segment(x)
        head(head.seen(net.segments[unit], x), Batch(x, views=2))
    return x, found[0]


@pytest.mark.parametrize(("pool", "registers"), [("token", 0), ("avg", 0), ("both", 3), ("auto", 0)])
def test_heads_see_the_class_token_the_mean_of_the_patches_or_both(pool: Any, registers: int) -> None:
    net = network("vit", Projection(pool=pool, **SMALL), reg_tokens=registers)  # type: ignore[arg-type]
    for unit in (1, 3):
        x, given = seen(net, unit)
        token, mean = x[:, 0], x[:, 1 + registers :].mean(1)
        own = token if unit == 3 else mean  # timm's pooling on the last segment
        expected = {"token": token, "avg": mean, "both": torch.cat([token, mean], 1), "auto": own}[pool]
        assert torch.allclose(given, expected, rtol=1e-12), unit


@pytest.mark.parametrize("name", ["swin", "resnet8"])
def test_maps_have_a_mean(name: str) -> None:
    net = network(name, Projection(pool="avg", **SMALL))  # type: ignore[arg-type]
    x, given = seen(net, 1)
    assert torch.allclose(given, net.segments[1].to_map(x).mean((2, 3)))


def test_classifiers_see_tokens_too() -> None:
    options = dgl.Options(head=Classifier("0c2f", pool="both"))
    net = local_network(networks.transformer("vit", 16), "dgl", options, image_size=16, num_classes=10)
    net.double().train()
    x, given = seen_by_classifier(net)
    assert torch.allclose(given, torch.cat([x[:, 0], x[:, 1:].mean(1)], 1))
    net(networks.batch(net)).loss.backward()
    assert net.get_parameter("backbone.cls_token").grad is not None


def seen_by_classifier(net: LocalNetwork) -> tuple[Tensor, Tensor]:
    head, segment = net.plan.units[0].head, net.segments[0]
    found: list[Tensor] = []
    linear = next(module for module in head.modules() if isinstance(module, nn.Linear))
    handle = linear.register_forward_hook(lambda module, inputs, output: found.append(inputs[0]))
    with torch.no_grad():
        x = segment(torch.randn(4, 3, 16, 16, dtype=torch.float64))
        assert head.predict(head.seen(segment, x)).shape == (4, 10)
    handle.remove()
    return x, found[0]


def test_a_teacher_sees_what_the_head_sees() -> None:
    """With the average equal to the network, both embeddings are the same."""
    net = network("vit", Projection(pool="both", objective="mocov3", pred_hidden=8, **SMALL))  # type: ignore[arg-type]
    data = networks.batch(net, size=4)
    keys = networks.taught_by(net, data)
    x = data.images
    for unit, segment in zip(net.plan.units, net.segments, strict=True):
        x = segment(x)
        assert torch.allclose(keys[unit.head].teacher, unit.head.embedder()(x))  # type: ignore[arg-type]


REFUSED: dict[str, tuple[str, dict[str, Any], Any, str]] = {
    "no token": ("resnet8", {}, {"pool": "token"}, "no class token in segment layer1; must be auto or avg"),
    "swin": (
        "swin",
        {},
        {"pool": "both"},
        "method.head.pool=both: there is no class token in segment layers.0",
    ),
    "registers alone": (
        "vit",
        {"class_token": False, "reg_tokens": 2, "global_pool": "avg"},
        {"pool": "token"},
        "method.head.pool=token: there is no class token in segment blocks.0",
    ),
    "convolutions": ("vit", {}, {"pool": "token", "conv_blocks": 1}, "set method.head.conv_blocks=0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_token_that_is_not_there_is_one_line(case: str) -> None:
    name, arguments, head, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        network(name, build(Projection, {**head, **SMALL}), **arguments)


def test_classifiers_on_maps_see_no_token() -> None:
    options = dgl.Options(head=Classifier("mlp_sr", pool="token"))
    with pytest.raises(UserError, match=r"method.head.pool=token: kind=mlp_sr sees the map; set kind=linear"):
        local_network(networks.transformer("vit", 16), "dgl", options, image_size=16, num_classes=10)
