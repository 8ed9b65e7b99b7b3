"""Segments reproduce their network, and the CIFAR ResNets are what the papers counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from framework.errors import UserError
from framework.model import local_network
from framework.network import create, cut, output_shapes


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet32", "resnet110"]
)
@pytest.mark.parametrize("at", ["stage", "block"])
@torch.no_grad()
def test_segments_in_order_equal_the_network_bit_for_bit(name: str, at: str) -> None:
    torch.manual_seed(0)
    network = create(name).eval()
    images = torch.randn(2, 3, 64, 64)
    x = images
    segments = cut(network, at)
    for segment in segments:
        x = segment(x)
    assert torch.equal(x, network.forward_features(images))
    owned = [p for s in segments for p in s.parameters()]
    assert len(owned) == len(set(map(id, owned))) == len(list(network.parameters()))


def test_segments_count_as_the_papers_do() -> None:
    """ResNet-50 has four stages; MLAAN's code cuts ResNet-32/110/101/152 into 15, 54, 33 and 50 modules."""
    assert [s.name for s in cut(create("resnet50"))] == ["layer1", "layer2", "layer3", "layer4"]
    for name, modules in [("resnet32", 15), ("resnet110", 54), ("resnet101", 33), ("resnet152", 50)]:
        assert len(cut(create(name), "block")) == modules


@pytest.mark.parametrize(("name", "millions"), [("resnet32", 0.467), ("resnet110", 1.731)])
def test_cifar_resnets_have_the_papers_size(name: str, millions: float) -> None:
    parameters = sum(p.numel() for p in timm.create_model(name, num_classes=10).parameters())
    assert round(parameters / 1e6, 3) == millions


def test_parameter_names_are_timms() -> None:
    net = local_network("resnet18", "loco", image_size=64)
    assert set(net.backbone.state_dict()) == set(timm.create_model("resnet18", num_classes=0).state_dict())


@torch.no_grad()
def test_a_cifar_backbone_loads_through_timm(tmp_path: Path) -> None:
    source = create("resnet20").eval()
    save_file(source.state_dict(), tmp_path / "backbone.safetensors")
    loaded = timm.create_model(
        "resnet20", num_classes=0, checkpoint_path=str(tmp_path / "backbone.safetensors")
    )
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.eval()(images), source(images))


def test_probing_shapes_leaves_the_network_as_it_was() -> None:
    network = create("resnet18").train()
    network.layer2.eval()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    shapes = output_shapes(cut(network), 64)
    assert [tuple(s) for s in shapes] == [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]
    assert network.layer1.training and not network.layer2.training
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"network": "resnet05"}, "network.name=resnet05: no such network; did you mean resnet"),
        ({"network": "vgg11"}, "VGG can't be cut"),
        ({"network": "resnet18", "cut": "atom"}, "network.cut='atom': a network is cut at stage or block"),
        ({"network": "resnet18", "method": "locco"}, "method.name=locco: must be one of bp, dgl, gim, loco"),
    ],
)
def test_impossible_networks_are_refused(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        local_network(**{"method": "loco", "image_size": 32, **arguments})  # type: ignore[arg-type]
