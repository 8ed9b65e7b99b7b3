"""The networks are what the papers counted, and stay timm's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from framework.model import local_network
from framework.network import create, cut, output_shapes
from framework.network.norm import synchronize
from framework.runtime.errors import UserError

#: LoCo, Table 6: FLOPs of each stage in percent, the stem in the first, without the classifier
TABLE_6 = {
    "resnet50": (19.39, 25.09, 35.80, 19.73),
    "presnet50": (13.50, 14.63, 14.77, 16.62, 20.45, 20.04),
}


def skeleton(name: str, **arguments: Any) -> nn.Module:
    """A network with its classifier and without memory."""
    with torch.device("meta"):
        return timm.create_model(name, **arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "millions"),
    [
        ("resnet32", {"num_classes": 10}, 0.467),
        ("resnet110", {"num_classes": 10}, 1.731),
        ("presnet50", {}, 27.258),
        ("presnet50", {"num_classes": 0}, 23.161),
        ("presnet50", {"pres_groups": "table8"}, 25.030),
        ("presnet50", {"pres_res4_width": 128}, 26.971),
        ("shufflenetv2_50", {}, 16.574),
        ("shufflenetv2_50", {"num_classes": 0}, 14.525),
    ],
)
def test_networks_have_the_papers_size(name: str, arguments: dict[str, Any], millions: float) -> None:
    parameters = sum(p.numel() for p in skeleton(name, **arguments).parameters())
    assert round(parameters / 1e6, 3) == millions


def multiply_adds(network: nn.Module) -> dict[str, float]:
    """Of convolutions and linear layers for a 224 pixel image, by child; the whole under ``"Global"``."""
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 3, 224, 224, device="meta"))
    counts = counter.get_flop_counts()
    return {
        name.rpartition(".")[2]: sum(flops.values()) / 2
        for name, flops in counts.items()
        if name.count(".") < 2
    }


@pytest.mark.parametrize(
    ("name", "arguments", "billions"),
    [
        ("resnet50", {}, 4.089),
        ("presnet50", {}, 4.145),
        ("presnet50", {"pres_resize": "pre"}, 4.106),
        ("presnet50", {"pres_groups": "table8"}, 3.794),
        ("presnet50", {"pres_groups": "table8", "pres_resize": "pre"}, 3.756),
        ("presnet50", {"pres_res4_width": 128}, 4.000),
        ("shufflenetv2_50", {}, 2.304),
    ],
)
def test_networks_cost_what_the_papers_say(name: str, arguments: dict[str, Any], billions: float) -> None:
    assert round(multiply_adds(skeleton(name, **arguments))["Global"] / 1e9, 3) == billions


@pytest.mark.parametrize("name", TABLE_6)
def test_shares_of_flops_are_table_6(name: str) -> None:
    """Counted as the paper must have: multiply-adds, and 2 for every element that a BatchNorm writes."""
    network = skeleton(name)
    writes = written(network, nn.BatchNorm2d)
    cost = multiply_adds(network)
    cost = {
        child: cost.get(child, 0) + 2 * sum(_below(writes, child)) for child, _ in network.named_children()
    }
    stages = [cost[f"layer{stage + 1}"] for stage in range(len(TABLE_6[name]))]
    stages[0] += cost["conv1"] + cost["bn1"]
    shares = [100 * stage / sum(stages) for stage in stages]
    assert shares == pytest.approx(TABLE_6[name], abs=0.1)


def written(network: nn.Module, kind: type[nn.Module]) -> dict[str, int]:
    """Elements that each module of a kind writes for one 224 pixel image."""
    elements: dict[str, int] = {}
    for name, module in network.named_modules():
        if isinstance(module, kind):
            module.register_forward_hook(lambda *call, name=name: elements.update({name: call[-1].numel()}))
    network(torch.empty(1, 3, 224, 224, device="meta"))
    return elements


def _below(counts: dict[str, int], path: str) -> list[int]:
    return [count for name, count in counts.items() if f"{name}.".startswith(f"{path}.")]


@pytest.mark.parametrize(
    ("name", "arguments", "shares"),
    [
        ("resnet50", {}, [24 / 55, 16 / 55, 12 / 55, 3 / 55]),
        ("presnet50", {"pres_res4_width": 128}, [0.1546, 0.1096, 0.1948, 0.1731, 0.1948, 0.1731]),
        ("presnet50", {"pres_res4_width": 144}, [0.1510, 0.1070, 0.2139, 0.1690, 0.1901, 0.1690]),
    ],
)
def test_shares_of_memory(name: str, arguments: dict[str, Any], shares: list[float]) -> None:
    """Residual blocks times the elements that the convolutions of one write, as LoCo's Table 6 counts."""
    network = skeleton(name, **arguments)
    elements = written(network, nn.Conv2d)
    stages = []
    for i in range(len(shares)):
        blocks = len(network.get_submodule(f"layer{i + 1}"))
        stages.append(blocks * sum(_below(elements, f"layer{i + 1}.{blocks - 1}")))
    assert [stage / sum(stages) for stage in stages] == pytest.approx(shares, abs=1e-4)


@pytest.mark.slow
def test_presnet_keeps_its_ratios_at_other_sizes() -> None:
    for image_size, sides in [
        (224, (56, 36, 24, 16, 12, 8)),
        (128, (32, 21, 14, 9, 7, 5)),
        (32, (8, 5, 3, 2, 2, 1)),
    ]:
        with torch.device("meta"):
            shapes = output_shapes(cut(create("presnet50")), image_size)
        assert tuple(shape.height for shape in shapes) == sides
        assert [shape.channels for shape in shapes] == [56, 96, 576, 1024, 2048, 4096]


@torch.no_grad()
def test_shuffling_mixes_the_halves() -> None:
    """Every output channel pair holds one that passed and one that was convolved."""
    torch.manual_seed(0)
    unit = create("shufflenetv2_50").layer1[1].eval()
    x = torch.rand(1, 244, 4, 4)
    y = unit(x)
    assert torch.equal(y[:, 0::2], x[:, :122])
    assert torch.equal(y[:, 1::2], unit.branch(x[:, 122:]).relu())


@pytest.mark.parametrize("training", [False, True])
def test_synchronized_batchnorm_keeps_the_activation(training: bool) -> None:
    """timm's BatchNorms hold the activation that follows; one process must compute what it did."""
    torch.manual_seed(0)
    network = create("regnety_002").train(training)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(synchronize(copy.deepcopy(network))(images), network(images))


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
        (
            {"network": "efficientvim_m1", "image_size": 224},
            "EfficientViM can't be cut into segments: its features are list, and must be one tensor",
        ),
        ({"network": "resnet18", "cut": 99}, "network.cut=99: the network has 8 blocks"),
        (
            {"network": "resnet18", "method": "locco"},
            "method.name=locco: must be one of auglocal, blockwise, bp, dfa, dgl",
        ),
    ],
)
def test_impossible_networks_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        local_network(**{"method": "loco", "image_size": 32, **arguments})


def test_presnet_refuses_what_is_no_reading_of_the_paper() -> None:
    with pytest.raises(UserError, match="refuses them: pres_groups=table7 must be one of table6, table8"):
        create("presnet50", pres_groups="table7")


def test_arguments_that_timm_does_not_check_are_refused() -> None:
    with pytest.raises(UserError, match=r"network.args.drop_path_rate=2.0: must be at least 0 and below 1"):
        create("resnet10t", drop_path_rate=2.0)
    with pytest.raises(UserError, match="refuses them: KeyError: 'nonsense'"):
        create("regnetx_002", act_layer="nonsense")


def test_resnet18_cifar_is_timms_resnet18_but_for_the_stem() -> None:
    theirs = {n: tuple(t.shape) for n, t in timm.create_model("resnet18", num_classes=0).state_dict().items()}
    ours = {n: tuple(t.shape) for n, t in create("resnet18_cifar").state_dict().items()}
    assert ours.pop("conv1.weight") == (64, 3, 3, 3) and theirs.pop("conv1.weight") == (64, 3, 7, 7)
    assert ours == theirs
    segments = cut(create("resnet18_cifar", channels=[16, 32, 64, 128]))
    assert output_shapes(segments, 32) == ((16, 32, 32), (32, 16, 16), (64, 8, 8), (128, 4, 4))
