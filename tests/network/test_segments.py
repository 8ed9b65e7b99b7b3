"""Segments in order are their network, whatever its family, and train as the definition says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from framework.local.methods import mlaan
from framework.model import local_network
from framework.network import Segment, create, cut, output_shapes
from framework.network.anatomy import parents
from framework.runtime.errors import UserError
from tests.execution.test_routing import assert_equals_definition
from tests.support import networks
from tests.support.marks import slow
from tests.support.networks import relative_error

DROP = {"drop_path_rate": 0.3}

#: name -> segments of a "stage" and of a "block" cut, arguments that make training random
NETWORKS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "resnet18": (4, 8, DROP),
    "resnet34": (4, 16, DROP),
    "resnet50": (4, 16, DROP),
    "resnet101": (4, 33, DROP),
    "resnet152": (4, 50, DROP),
    "resnet32": (3, 15, {}),
    "resnet110": (3, 54, {}),
    "presnet50": (6, 18, {}),
    "shufflenetv2_50": (4, 16, {"residual": True}),
    "resnext50_32x4d": (4, 16, DROP),
    "convnext_tiny": (4, 18, DROP),
    "vit_small_patch16_224": (4, 12, DROP | {"img_size": 64, "pos_drop_rate": 0.3}),
    "efficientnet_b0": (5, 16, DROP),
    "mobilenetv3_large_100": (5, 16, DROP),
    "regnety_008": (4, 14, DROP),
    "densenet121": (4, 4, {"drop_rate": 0.3}),
    "swin_tiny_patch4_window7_224": (4, 12, DROP | {"img_size": 64}),
}

#: those that take seconds
LARGE = [
    "resnet34",
    "resnet110",
    "regnety_008",
    "efficientnet_b0",
    "resnet101",
    "resnet152",
    "presnet50",
    "resnext50_32x4d",
    "convnext_tiny",
    "shufflenetv2_50",
    "swin_tiny_patch4_window7_224",
    "mobilenetv3_large_100",
    "densenet121",
]

#: one network a family, made small where it has arguments for that
SMALL: dict[str, dict[str, Any]] = {
    "presnet50": {},
    "shufflenetv2_50": {},
    "resnext50_32x4d": {"layers": (1, 1, 2, 1), "base_width": 1},
    "convnext_atto": {},
    "vit_small_patch16_224": {"img_size": 64, "depth": 4, "embed_dim": 96},
    "efficientnet_b0": {},
    "mobilenetv3_large_100": {},
    "regnety_008": {},
    "densenet121": {"growth_rate": 16, "block_config": (2, 3, 4, 3)},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "embed_dim": 24, "drop_path_rate": 0.0},
}


def run(segments: list[Segment], x: Tensor) -> Tensor:
    """All segments in order."""
    for segment in segments:
        x = segment(x)
    return x


@pytest.mark.parametrize("name", [*(n for n in NETWORKS if n not in LARGE), *slow(LARGE)])
@torch.no_grad()
def test_segments_in_order_equal_the_network_bit_for_bit(name: str) -> None:
    """In evaluation and, with the same random numbers, in training; each parameter is in one segment."""
    stages, blocks, arguments = NETWORKS[name]
    torch.manual_seed(0)
    network = create(name, **arguments)
    images = torch.randn(2, 3, 64, 64)
    for training in (False, True):
        network.train(training)
        torch.manual_seed(1)
        whole = network.forward_features(images)
        for at, count in [("stage", stages), ("block", blocks)]:
            segments = cut(network, at)
            torch.manual_seed(1)
            assert torch.equal(run(segments, images), whole)
            assert len(segments) == count
            owned = [p for s in segments for p in s.parameters()]
            trainable = [p for p in network.parameters() if p.requires_grad]
            assert len(owned) == len(set(owned)) and set(owned) == set(trainable)


@pytest.mark.parametrize(
    "name", [*(n for n in SMALL if n not in LARGE), *slow(n for n in SMALL if n in LARGE)]
)
def test_local_units_on_every_family_equal_the_definition(name: str) -> None:
    """Windows of one segment, as GIM's, and of two, as LoCo's, in one plan."""
    torch.manual_seed(0)
    size = SMALL[name].get("img_size", 32)
    backbone = create(name, **SMALL[name])
    options = mlaan.Options(window=2, lam_on="none")
    net = (
        local_network(backbone, "mlaan", options, image_size=size, num_classes=networks.CLASSES)
        .double()
        .train()
    )
    assert_equals_definition(net, networks.batch(net, size=4, image_size=size))


@pytest.mark.slow
def test_only_what_comes_after_the_last_map_is_frozen() -> None:
    frozen = {}
    for name in NETWORKS:
        with torch.device("meta"):
            network = create(name)
        cut(network)
        frozen[name] = {n for n, p in network.named_parameters() if not p.requires_grad}
    assert {name: names for name, names in frozen.items() if names} == {
        "convnext_tiny": {"head.norm.weight", "head.norm.bias"},
        "mobilenetv3_large_100": {"conv_head.weight", "conv_head.bias"},
    }


def test_a_parameter_outside_all_blocks_is_refused() -> None:
    network = create("convnext_atto")
    network.stages[1].extra = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"ConvNeXt can't be cut: parameter stages.1.extra.weight is in none"):
        cut(network)


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "swin_tiny_patch4_window7_224"])
@torch.no_grad()
def test_heads_and_features_get_maps(name: str) -> None:
    """A transformer's patches lie in the map where they lie in the image; class tokens are left out."""
    net = local_network(create(name, **SMALL[name]), "dgl", image_size=64, num_classes=10).eval()
    images = torch.randn(2, 3, 64, 64)
    output = net.backbone.forward_features(images)
    patches = output[:, 1:] if name.startswith("vit") else output.flatten(1, 2)
    expected = output[:, 0] if name.startswith("vit") else patches.mean(1)
    assert relative_error(net.features(images), expected) < 1e-5
    shape = output_shapes(net.segments, 64)[-1]
    last = net.segments[-1].to_map(output)
    assert last.shape[1:] == shape and shape.height == shape.width
    assert torch.equal(last[:, :, 1, 0], patches[:, shape.width])
    head = net.plan.units[-1].head
    assert torch.equal(net.predict(images), head.predict(head.seen(net.segments[-1], output)))


@pytest.mark.parametrize(
    ("name", "k"),
    [("resnet32", 16), ("resnet34", 17), *slow([("resnet110", 55), ("resnet101", 34), ("resnet152", 51)])],
)
def test_segments_count_as_the_papers_do(name: str, k: int) -> None:
    """The papers' K counts the stem; MLAAN merges it into the first block, InfoPro does not."""
    with torch.device("meta"):
        network = create(name)
    merged, single = cut(network, k), cut(network, k, stem_as_module=True)
    assert [s.paths for s in merged] == [s.paths for s in cut(network, "block")] and len(merged) == k - 1
    assert len(single) == k and single[0].name == "stem"
    assert single[0].paths + single[1].paths == merged[0].paths
    assert [s.paths for s in single[2:]] == [s.paths for s in merged[1:]]


def ends(name: str, at: Any) -> list[str]:
    """Name of every segment, which is that of its last block."""
    with torch.device("meta"):
        return [s.name.removeprefix("layer") for s in cut(create(name), at)]


def test_published_partitions() -> None:
    assert ends("resnet32", 8) == ["1.0", "1.2", "1.4", "2.1", "2.3", "3.0", "3.2", "3.4"]
    authors = ends("resnet110", 32)
    assert authors[:11] == [f"1.{b}" for b in (1, 2, 4, 5, 7, 9, 11, 13, 14, 16, 17)]
    assert [e.replace("2.", "1.", 1) for e in authors[11:22]] == authors[:11]
    assert authors[22:] == [f"3.{b}" for b in (1, 3, 4, 6, 7, 9, 11, 13, 15, 17)]
    assert ends("resnet110", 2) == ["1.14", "3.17"] and ends("resnet152", 2) == ["2.5", "4.2"]
    assert ends("resnet50", 4) == ["2.0", "3.0", "3.4", "4.2"]
    assert ends("resnet50", ["layer1", "layer3.1", "layer4"]) == ["1.2", "3.1", "4.2"]


def test_a_stem_apart_leaves_an_even_cut() -> None:
    """No paper lists partitions with the stem apart, other than one block a module."""
    sizes = [len(s.paths) for s in cut(create("resnet110"), 3, stem_as_module=True)]
    assert sizes == [3, 27, 27]


def test_any_number_of_modules_covers_the_network() -> None:
    network = create("resnet32")
    whole = [path for segment in cut(network) for path in segment.paths]
    for k in range(1, 16):
        segments = cut(network, k)
        assert len(segments) == k and [path for s in segments for path in s.paths] == whole
        assert len(cut(network, k + 1, stem_as_module=True)) == k + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"at": "atom"}, "network.cut='atom': a network is cut at stage or block, into a number of modules"),
        (
            {"at": 0},
            r"network.cut=0: the network has 8 blocks, so 1 to 8 \(or 9, counting the stem\) modules",
        ),
        ({"at": 10}, "network.cut=10: the network has 8 blocks"),
        ({"at": 1, "stem_as_module": True}, "network.cut=1: the network has 8 blocks, so 2 to 9 modules"),
        (
            {"at": ["layer1.2", "layer4"]},
            "no block layer1.2; blocks are called layer1.0 to layer4.1, stages lay",
        ),
        ({"at": ["layer1", "layer3"]}, r"must be in the network's order and end with layer4.1"),
        ({"at": ["layer2", "layer1", "layer4"]}, r"must be in the network's order"),
        ({"at": []}, r"network.cut=\[\]: must be in the network's order"),
    ],
)
def test_impossible_cuts_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cut(create("resnet18"), **arguments)


@pytest.mark.parametrize(
    ("name", "image_size", "message"),
    [
        (
            "resnet18",
            16,
            "data.image_size=16: too small for ResNet, which downsamples by 32; must be at least 17",
        ),
        ("vit_small_patch16_224", 96, r"data.image_size=96: .*224.* Set network.args.img_size=96"),
        ("swin_tiny_patch4_window7_224", 96, r"data.image_size=96: .*224.* Set network.args.img_size=96"),
    ],
)
def test_images_that_do_not_fit_are_refused(name: str, image_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        local_network(name, "gim", image_size=image_size)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "vit_srelpos_small_patch16_224",
            {},
            "VisionTransformerRelPos can't be cut into segments: more than two tensors pass between its blocks, or",
        ),
        ("coat_tiny", {}, "CoaT can't be cut into segments: its features are list, and must be one tensor"),
        ("vit_tiny_patch16_224", {"patch_drop_rate": 0.5}, "patch_drop_rate: heads read the whole map"),
    ],
)
def test_networks_that_can_not_be_cut_are_refused(name: str, arguments: dict[str, Any], message: str) -> None:
    with torch.device("meta"):
        network = create(name, **arguments)
    with pytest.raises(UserError, match=message):
        cut(network)


@pytest.mark.parametrize(
    ("blocks", "ends"),
    [
        (("s0.0", "s0.1", "s1.0"), [("s0", 1), ("s1", 2)]),
        (("s.0.0", "down.0", "s.1.0", "s.1.1"), [("s.0", 0), ("down", 1), ("s.1", 3)]),
        (("s.0.0", "down.0", "s.1.0", "down.1", "s.2.0"), [("s.0", 0), ("s.1", 2), ("s.2", 4)]),
        (("s.0.0", "pos.0", "s.0.1", "s.1.0", "pos.1", "s.1.1"), [("s.0", 2), ("s.1", 5)]),
        (("a.0", "b.0", "a.1", "b.1"), None),
        (("blocks.0", "blocks.1"), None),
    ],
)
def test_groups_by_the_modules_that_hold_blocks_have_one_name_each(
    blocks: tuple[str, ...], ends: list[tuple[str, int]] | None
) -> None:
    """Twins has a list of position convolutions, one in the middle of each group, and reports no module that it has."""
    assert parents(blocks) == ends
