"""What the methods' own parts compute, against definitions written out by hand."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from framework.data.batch import Batch
from framework.execution import LocalNetwork
from framework.local import LocalUnit, NetworkInfo, Plan, lam_tables
from framework.local.blocks import blocks_of
from framework.local.head import Head
from framework.local.heads import Classifier, Projection
from framework.local.lam import LamBuilder
from framework.local.lam_copies import Copies
from framework.local.methods import auglocal, dgl, infopro, loco, mlaan
from framework.local.reconstruction import Reconstruction
from framework.local.resizing import ResizedConv
from framework.model import local_network
from framework.network import Segment, Shape, create, cut, output_shapes
from framework.network.layers import GlobalAveragePool
from framework.runtime.errors import UserError
from tests.support import networks
from tests.support.networks import CLASSES, relative_error


def train_steps(net: LocalNetwork, steps: int, micro_batches: int = 1) -> None:
    """Plain SGD; each step's micro-batches are the same for every number of them."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(steps):
        data = networks.batch(net, seed=step)
        assert data.labels is not None
        parts = zip(data.images.chunk(micro_batches), data.labels.chunk(micro_batches), strict=True)
        for number, (images, labels) in enumerate(parts, start=1):
            net(Batch(images, labels, last=number == micro_batches)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def by_hand_mlaan(net: LocalNetwork, data: Batch) -> Tensor:
    """The authors' loop with k=2: y carries the window's oldest module, x the independent path."""
    modules, heads = net.segments, net.heads
    names = [segment.name.replace(".", "_") for segment in modules]
    weight = {"single": 0.001, "window": 0.999}
    total = torch.zeros((), dtype=torch.float64)
    x = modules[0](data.images).detach()
    y_input = data.images
    for i in range(1, len(modules)):
        x = modules[i](x)
        y = modules[i - 1](y_input)
        z = modules[i](y)
        if i < len(modules) - 1:
            window, single = heads[f"{names[i]}/window"], heads[f"{names[i]}/single"]
            chain = window.lam
            z = chain.aug[0](z) + chain.ema[0].block(z)
            for block in chain.aug[1:]:
                z = block(z)
            scores, plain = window.head.trunk(z), single.trunk(x)
        else:
            last = heads[f"{names[i]}/single"]
            scores, plain = last.trunk(z), last.trunk(x)
        total = total + weight["window"] * F.cross_entropy(scores, data.labels)
        total = total + weight["single"] * F.cross_entropy(plain, data.labels)
        x, y_input = x.detach(), y.detach()
    return total


def test_mlaan_is_the_authors_loop() -> None:
    net = networks.network("mlaan").double()
    data = networks.batch(net)
    ours = networks.routed(net, data)
    parameters = dict(net.named_parameters())
    theirs = torch.autograd.grad(by_hand_mlaan(net, data), list(parameters.values()))
    for name, gradient in zip(parameters, theirs, strict=True):
        assert relative_error(ours[name], gradient) < 1e-9, name


@pytest.mark.parametrize("accumulation", [1, 2])
def test_copies_follow_the_weights_before_each_step(accumulation: int) -> None:
    net = networks.network("mlaan", "resnet8").double()
    head = net.heads["layer2_0/window"]
    live = net.backbone.get_submodule("layer3.0")
    expected = {name: p.detach().clone() for name, p in live.named_parameters()}
    ema = head.lam.ema[0]
    assert all(torch.equal(ema.block.get_buffer(n), value) for n, value in expected.items())
    for step in range(3):
        for name, p in live.named_parameters():
            expected[name] = 0.995 * expected[name] + 0.005 * p.detach()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        data = networks.batch(net, seed=step)
        for number in range(1, accumulation + 1):
            net(data._replace(last=number == accumulation)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in live.named_parameters():
        assert torch.allclose(ema.block.get_buffer(name), expected[name], rtol=1e-12, atol=0)
        assert not torch.allclose(p, expected[name], rtol=1e-4)


def test_copies_are_in_the_state_dict_and_in_no_optimizer() -> None:
    net = networks.network("mlaan", "resnet8")
    name = "heads.layer2_0/window.lam.ema.0.block.conv1.weight"
    assert name in net.state_dict() and name not in dict(net.named_parameters())
    assert not any(".ema." in n for n, p in net.named_parameters())
    train_steps(net.double(), 1)
    other = networks.network("mlaan", "resnet8", seed=1).double()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.get_buffer(name), net.get_buffer(name))
    assert set(net.backbone.state_dict()) == set(create("resnet8").state_dict())


@pytest.mark.parametrize("mode", ["eval", "no_grad", "not last"])
def test_copies_stand_still_outside_a_step(mode: str) -> None:
    net = networks.network("mlaan", "resnet8").double()
    train_steps(net, 1)
    data = networks.batch(net)
    before = copy.deepcopy(dict(net.named_buffers()))
    if mode == "eval":
        net.eval()(data)
    elif mode == "no_grad":
        with torch.no_grad():
            net(data)
    else:
        net(data._replace(last=False)).loss.backward()
    copies = [
        name for name in before if ".ema." in name and "running" not in name and "num_batches" not in name
    ]
    assert copies and all(torch.equal(net.get_buffer(name), before[name]) for name in copies)


def test_copies_stand_still_on_a_float16_overflow_of_any_micro_batch() -> None:
    net = networks.network("mlaan", "resnet8", precision="fp16")
    assert net.scales is not None
    name = "heads.layer2_0/window.lam.ema.0.block.conv1.weight"
    with torch.no_grad():
        net.backbone.get_parameter("layer3.0.conv1.weight").add_(1.0)
    data = networks.batch(net)
    data = data._replace(images=data.images.float())
    before, good = net.get_buffer(name).clone(), net.scales.scale.clone()
    net.scales.scale.fill_(2.0**100)
    assert net(data._replace(last=False)).overflow
    net.scales.scale.copy_(good)
    assert not net(data).overflow
    assert torch.equal(net.get_buffer(name), before)
    net(data)
    assert torch.allclose(net.get_buffer(name), before + 0.005, atol=1e-5)


@pytest.mark.parametrize(("update", "moving"), [("all", 2), ("last_only", 1)])
def test_which_copies_move(update: str, moving: int) -> None:
    options = mlaan.Options(window=1, ema_update=update)  # type: ignore[arg-type]
    net = local_network("resnet8", "mlaan", options, image_size=16, num_classes=CLASSES, cut="block").train()
    net = net.double()
    before = {n: b.clone() for n, b in net.named_buffers() if n.endswith("ema.0.block.conv1.weight")}
    train_steps(net, 2)
    moved = [name for name, value in before.items() if not torch.equal(net.get_buffer(name), value)]
    assert len(moved) == moving and moved[-1] == "heads.layer2_0/window.lam.ema.0.block.conv1.weight"


def modules_of(name: str, ends: list[tuple[int, int]]) -> NetworkInfo:
    """A CIFAR ResNet cut after the blocks (stage, number) in ``ends``."""
    backbone = create(name)
    blocks = cut(backbone, "block")
    segments, paths = [], ()
    for segment in blocks:
        paths += segment.paths
        stage, number = segment.name.removeprefix("layer").split(".")
        if (int(stage), int(number)) in ends:
            segments.append(Segment(backbone, segment.name, paths))
            paths = ()
    return NetworkInfo.of(segments, 32, CLASSES, (0.5,) * 3, (0.25,) * 3)


R32_8 = [(1, 0), (1, 2), (1, 4), (2, 1), (2, 3), (3, 0), (3, 2), (3, 4)]
R110_32 = [(s, b) for s in (1, 2) for b in (1, 2, 4, 5, 7, 9, 11, 13, 14, 16, 17)]
R110_32 += [(3, b) for b in (1, 3, 4, 6, 7, 9, 11, 13, 15, 17)]


@pytest.mark.parametrize(
    ("name", "ends", "trained", "averaged"),
    [
        ("resnet32", R32_8, 1.59, 0.31),
        ("resnet32", [(s, b) for s in (1, 2, 3) for b in range(5)], 3.17, 0.66),
        ("resnet110", R110_32, 6.76, 1.46),
        ("resnet110", [(s, b) for s in (1, 2, 3) for b in range(18)], 11.44, 2.56),
    ],
)
def test_lams_are_as_large_as_the_authors(
    name: str, ends: list[tuple[int, int]], trained: float, averaged: float
) -> None:
    """Millions of parameters, counted on the authors' code."""
    network = modules_of(name, ends)
    builder = LamBuilder(network, {}, Copies())
    lists = [builder.blocks(i) for i in range(len(network) - 1)]
    sizes = [
        [sum(p.numel() for p in b.module(network.segments).parameters()) for b in blocks] for blocks in lists
    ]
    assert round(sum(map(sum, sizes)) / 1e6, 2) == trained
    assert round(sum(size[0] for size in sizes) / 1e6, 2) == averaged


@pytest.mark.parametrize(("channels", "counts"), lam_tables.PUBLISHED)
def test_every_published_list_names_blocks_that_exist(
    channels: tuple[int, ...], counts: tuple[int, ...]
) -> None:
    for modules, rows in lam_tables.PUBLISHED[channels, counts].items():
        named = [name for _, copied in rows for name in copied.split()]
        places = [tuple(map(int, name.split("."))) for name in named]
        assert all(number < counts[stage - 1] for stage, number in places)
        if modules == sum(counts):
            ends = [(s + 1, b) for s, count in enumerate(counts) for b in range(count)][:-1]
            found = [[r for r in rows if any(lam_tables._within(e, i) for i in r[0].split())] for e in ends]
            assert [len(rows) for rows in found] == [1] * len(ends)


def test_the_rule_gives_the_authors_commonest_lists() -> None:
    blocks = blocks_of(cut(create("resnet32"), "block"))
    lists = {b.name: [c.name for c in lam_tables.by_rule(blocks, b)] for b in blocks[:-1]}
    assert lists["layer1.0"] == ["layer2.0", "layer3.0", "layer3.2", "layer3.4"]
    assert lists["layer2.4"] == ["layer3.0", "layer3.2", "layer3.3", "layer3.4"]
    assert lists["layer3.3"] == ["layer3.4"]
    assert all(names[-1] == "layer3.4" and len(set(names)) == len(names) for names in lists.values())


@pytest.mark.parametrize("name", ["convnext_atto", "regnetx_002", "efficientnet_b0"])
def test_lams_of_networks_that_nobody_published(name: str) -> None:
    """The rule reaches the network's last width, through blocks that begin with a downsampling of their own."""
    net = local_network(name, "mlaan", image_size=64, num_classes=CLASSES, cut="block")
    lam = net.plan.units[1].head.lam
    for copied, live in zip(lam.aug[0].parameters(), _first_copied(net).parameters(), strict=True):
        assert torch.equal(copied, live)
    last = lam(torch.zeros(2, *output_shapes(list(net.segments), 64)[1]))
    assert last.shape[1] == lam_width(net) and last.shape[2] == 2


def _first_copied(net: LocalNetwork) -> nn.Module:
    return net.plan.units[1].head.lam.followed[0].module(net.segments)


def lam_width(net: LocalNetwork) -> int:
    """Channels at the end of the last block (a tail may follow it)."""
    return blocks_of(net.segments)[-1].channels(net.segments)


def by_hand_loco(net: LocalNetwork, images: Tensor, upper_only: bool) -> Tensor:
    """LoCo on three stages: a loss on the second and the third; stage 1 of them is shared."""
    data = Batch(images, views=2)
    stages = net.segments
    lower, upper = net.heads["layer2"], net.heads["layer3"]
    first = stages[0](images)
    shared = stages[1]
    if upper_only:
        frozen = nn.Sequential(*copy.deepcopy(shared.modules()))
        loss = lower(frozen(first), data)
    else:
        loss = lower(shared(first), data)
    return loss + upper(stages[2](shared(first.detach())), data)


@pytest.mark.parametrize(("case", "upper_only"), [("loco", False), ("loco-upper", True)])
def test_loco_shares_gradients_as_table_5_says(case: str, upper_only: bool) -> None:
    """Rows 8 and 2: in the latter a shared stage learns from the upper loss; the lower passes through."""
    net = networks.network(case).double()
    data = networks.batch(net)
    ours = networks.routed(net, data)
    parameters = dict(net.named_parameters())
    theirs = torch.autograd.grad(by_hand_loco(net, data.images, upper_only), list(parameters.values()))
    for name, gradient in zip(parameters, theirs, strict=True):
        assert relative_error(ours[name], gradient) < 1e-9, name


def test_soft_sharing_pulls_both_copies() -> None:
    net = networks.network("loco-soft").double()
    data = networks.batch(net)
    with torch.no_grad():
        for parameter in net.backbone.layer2.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    lower, upper = net.heads["layer2"], net.heads["layer3"]
    output = copy.deepcopy(net)(data)
    first = net.segments[0](data.images)
    loss = lower.head(lower.copy(first), data)
    loss = loss + upper(net.segments[2](net.segments[1](first.detach())), data)
    differences = zip(lower.copy.parameters(), net.backbone.layer2.parameters(), strict=True)
    loss = loss + 0.01 * sum((a - b).pow(2).sum() for a, b in differences)
    assert torch.allclose(output.loss, loss)
    parameters = dict(net.named_parameters())
    theirs = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    ours = networks.routed(net, data)
    for name in parameters:
        assert relative_error(ours[name], theirs[name]) < 1e-9, name


WINDOWS = {
    "loco": (None, "stage", [(0, 1), (1, 2), (2, 3)]),
    "first": (loco.Options(loco_losses="with_first_stage"), "stage", [(0, 0), (0, 1), (1, 2), (2, 3)]),
    "1 block": (loco.Options(share_blocks=1), "block", [(0, 2), (2, 4), (4, 6), (6, 7)]),
    "2 blocks": (loco.Options(share_blocks=2), "block", [(0, 3), (2, 5), (4, 7), (6, 7)]),
    "soft": (loco.Options(soft_share=1e-3), "stage", [(0, 0), (1, 1), (2, 3)]),
}


@pytest.mark.parametrize("row", WINDOWS)
def test_windows_of_locos_ablations(row: str) -> None:
    options, where, windows = WINDOWS[row]
    net = local_network("resnet18", "loco", options, image_size=64, cut=where)
    assert [(u.first, u.last) for u in net.plan.units] == windows


DECODERS = {
    "4: 1 block, no downsampling": (Projection(conv_blocks=1, dec_strides=(1,)), 1, (256, 16, 16)),
    "5: 1 block": (Projection(conv_blocks=1), 1, (256, 8, 8)),
    "6: 2 blocks": (Projection(conv_blocks=2), 2, (256, 8, 8)),
    "7: 1 stage": (Projection(dec_trunk="next_stage"), 4, (512, 8, 8)),
    "8: full network": (Projection(dec_trunk="full_network"), 13, (2048, 2, 2)),
    "the next stage's block": (Projection(conv_blocks=1, dec_block="next_stage"), 1, (512, 8, 8)),
}


@pytest.mark.parametrize("row", DECODERS)
def test_decoders_of_table_4(row: str) -> None:
    """Residual blocks and what is pooled, on ResNet-50's first stage. On the last, nothing to copy."""
    options, blocks, pooled = DECODERS[row]
    network = NetworkInfo.of(cut(create("resnet50")), 64)
    before_pooling, mlp = _split(options.build(network, 0).trunk)
    assert sum(isinstance(m, Bottleneck) for m in before_pooling.modules()) == blocks
    assert before_pooling.eval()(torch.zeros(1, 256, 16, 16)).shape[1:] == pooled
    assert next(tuple(m.weight.shape) for m in mlp if isinstance(m, nn.Linear)) == (pooled[0], pooled[0])
    if options.dec_trunk != "none":
        assert len(_split(options.build(network, 3).trunk)[0]) == 0


def _split(trunk: nn.Sequential) -> tuple[nn.Sequential, nn.Sequential]:
    pool = next(i for i, layer in enumerate(trunk) if isinstance(layer, GlobalAveragePool))
    return trunk[:pool], trunk[pool + 1 :]


def test_auglocal_samples_later_blocks() -> None:
    """The authors' command for ResNet-110: depth 3, and less towards the end; all end 64 channels wide."""
    options = auglocal.Options(depth=3)
    assert [auglocal.auxiliary_depth(i, 55, options) for i in (0, 13, 14, 40, 53)] == [3, 3, 3, 2, 2]
    assert [auglocal.auxiliary_depth(i, 16, auglocal.Options()) for i in (0, 13, 14)] == [2, 2, 2]
    net = local_network("resnet20", "auglocal", options, image_size=32, num_classes=CLASSES, cut="block")
    for unit in net.plan.units[:-1]:
        blocks = [m for m in unit.head.trunk if isinstance(m, BasicBlock)]
        assert blocks[-1].conv2.out_channels == 64
        segment = next(i for i, s in enumerate(net.segments) if s.name == unit.name)
        stage = int(unit.name[5])
        assert sum(b.stride == 2 for b in blocks) == 3 - stage or len(blocks) < 3 - stage
        assert len(blocks) == min(auglocal.auxiliary_depth(segment, 9, options), 8 - segment)


@pytest.mark.parametrize("size", [((8, 8), (32, 32)), ((3, 5), (7, 11)), ((1, 2), (4, 4)), ((6, 6), (6, 6))])
@pytest.mark.parametrize("channels", [2, 64])
def test_resizing_after_the_channels_are_mixed(
    size: tuple[tuple[int, int], tuple[int, int]], channels: int
) -> None:
    small, large = size
    conv = ResizedConv(channels, 12, small, large, bias=True)
    x = torch.randn(2, channels, *small)
    resized = F.interpolate(x, large, mode="bilinear", align_corners=True)
    expected = F.conv2d(resized, conv.weight, conv.bias, padding=1)
    torch.testing.assert_close(conv(x), expected, rtol=1e-4, atol=1e-5)


def test_infopro_weighs_reconstruction_by_depth() -> None:
    net = networks.network("infopro").double()
    data = networks.batch(net)
    segment_outputs, x = [], data.images
    for segment in net.segments:
        x = segment(x)
        segment_outputs.append(x)
    head = net.heads["layer2_0"]
    decoder, classifier = head.parts
    image = (data.images * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)).double()
    image = (image + torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)).clamp(0, 1)
    reconstructed = torch.sigmoid(decoder.trunks[0](segment_outputs[2]))
    bce = -(image * reconstructed.log() + (1 - image) * (1 - reconstructed).log()).mean()
    task = F.cross_entropy(classifier.trunk(segment_outputs[2]), data.labels)
    expected = (5 + 0.2) / 2 * bce + (0.05 + 0.5) / 2 * task  # halfway: module 2 of 0..4
    assert torch.allclose(net(data).unit_losses[2], expected, rtol=1e-5)


@pytest.mark.parametrize(("image", "parameters"), [(32, 12 * 16 * 9 + 24 + 12 * 27 + 3), (128, None)])
def test_the_decoder_fits_the_image(image: int, parameters: int | None) -> None:
    network = modules_of("resnet32", [(1, 0), (3, 4)])
    network = dataclasses.replace(network, image=Shape(3, image, image))
    head = Reconstruction(first=(1, 0), last=(1, 0)).beside(Head(), network, 0, Shape(16, 16, 16))
    assert head is not None
    count = sum(p.numel() for p in head.parameters())
    large = 16 * 128 + 256 + 9 * (128 * 32 + 32 * 12 + 12 * 3) + 64 + 24 + 3
    assert count == (large if parameters is None else parameters)
    data = Batch(torch.randn(2, 3, image, image), torch.zeros(2, dtype=torch.int64))
    head(torch.randn(2, 16, 16, 16), data).backward()


class Nosy(Head):
    """Reads a segment that does not exist."""

    reads = (6,)


BAD = [
    (
        lambda: local_network("vit_tiny_patch16_224", "mlaan", image_size=224, num_classes=2, cut="block"),
        "no head can copy blocks of VisionTransformer: they do not work on maps",
    ),
    (
        lambda: Plan((LocalUnit("u", 0, 5, Nosy()),), 6),
        "its head reads segment 6, and the network has segments 0..5",
    ),
    (lambda: build("mlaan", mlaan.Options(window=7)), "window=7: the network has 6 segments, so 1 to 6"),
    (
        lambda: build("mlaan", mlaan.Options(lam_blocks={"layer2.1": ["layer3.0", "layer2.0"]})),
        "lam_blocks.layer2.1: layer2.0 is no later block; layer3.0, layer3.1 are",
    ),
    (
        lambda: build("mlaan", mlaan.Options(lam_blocks={"layer1.1": ["layer3.0"]})),
        "lam_blocks.layer1.1: layer3.0 can't follow each other",
    ),
    (
        lambda: build("mlaan", mlaan.Options(lam_blocks={"layer2.1": []})),
        "lam_blocks.layer2.1: must name at least one of layer3.0, layer3.1",
    ),
    (
        lambda: build("mlaan", mlaan.Options(lam_blocks={"layer9": []})),
        "no segment layer9; they are called layer1.0, layer1.1",
    ),
    (
        lambda: build("loco", loco.Options(share_blocks=1), "stage"),
        "share_blocks=1: must be at least 1, on a network",
    ),
    (lambda: build("loco", loco.Options(window=3, soft_share=1.0)), "soft_share=1.0: copies whole segments"),
    (lambda: build("dgl", dgl.Options(head=Classifier("2c9f"))), "kind=2c9f: must be one of linear, mlp_sr"),
    (
        lambda: build("infopro", infopro.Options(reconstruction=Reconstruction("svhn"))),
        "lambdas=svhn: has no values for K=7 of 6 blocks, only for K=2 of 54",
    ),
    (
        lambda: build("infopro", infopro.Options(reconstruction=Reconstruction("mlaan"))),
        "both lambdas are 0 at segment layer3.0",
    ),
]


def build(method: str, options: object, where: str = "block") -> LocalNetwork:
    return local_network("resnet14", method, options, image_size=16, num_classes=CLASSES, cut=where)


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_what_is_impossible_is_refused_in_one_line(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_frozen_part_of_a_head_stays_as_it_is() -> None:
    net = networks.network("dgl-1c2f").double()
    frozen = net.plan.units[0].head.trunk[0].weight.requires_grad_(False)
    net(networks.batch(net)).loss.backward()
    assert frozen.grad is None
    assert all(p.grad is not None for p in net.parameters() if p is not frozen)
