"""MLAAN's units, LAM and the copies in it, against definitions written out by hand."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework.data.batch import Batch
from framework.execution import LocalNetwork
from framework.local import lam_tables
from framework.local.blocks import blocks_of
from framework.local.lam import LamBuilder
from framework.local.lam_copies import Copies
from framework.local.methods import mlaan
from framework.model import local_network
from framework.network import create, cut, output_shapes
from tests.support import networks
from tests.support.networks import CLASSES, modules_of, relative_error


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
    net = networks.network("mlaan-code").double()
    data = networks.batch(net)
    ours = networks.routed(net, data)
    parameters = dict(net.named_parameters())
    theirs = torch.autograd.grad(by_hand_mlaan(net, data), list(parameters.values()))
    for name, gradient in zip(parameters, theirs, strict=True):
        assert relative_error(ours[name], gradient) < 1e-9, name


@pytest.mark.parametrize("accumulation", [1, 2])
def test_copies_follow_the_weights_before_each_step(accumulation: int) -> None:
    net = networks.network("mlaan-code", "resnet8").double()
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
    net = networks.network("mlaan-code", "resnet8")
    name = "heads.layer2_0/window.lam.ema.0.block.conv1.weight"
    assert name in net.state_dict() and name not in dict(net.named_parameters())
    assert not any(".ema." in n for n, p in net.named_parameters())
    train_steps(net.double(), 1)
    other = networks.network("mlaan-code", "resnet8", seed=1).double()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.get_buffer(name), net.get_buffer(name))
    assert set(net.backbone.state_dict()) == set(create("resnet8").state_dict())


@pytest.mark.parametrize("mode", ["eval", "no_grad", "not last"])
def test_copies_stand_still_outside_a_step(mode: str) -> None:
    net = networks.network("mlaan-code", "resnet8").double()
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
    net = networks.network("mlaan-code", "resnet8", precision="fp16")
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
    options = mlaan.Options(window=1, ema_update=update, lam_weights="two_copies")  # type: ignore[arg-type]
    net = local_network("resnet8", "mlaan", options, image_size=16, num_classes=CLASSES, cut="block").train()
    net = net.double()
    before = {n: b.clone() for n, b in net.named_buffers() if n.endswith("ema.0.block.conv1.weight")}
    train_steps(net, 2)
    moved = [name for name, value in before.items() if not torch.equal(net.get_buffer(name), value)]
    assert len(moved) == moving and moved[-1] == "heads.layer2_0/window.lam.ema.0.block.conv1.weight"


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
    net = local_network(
        name, "mlaan", mlaan.Options(window=2), image_size=64, num_classes=CLASSES, cut="block"
    )
    lam = net.plan.units[1].head.lam
    for copied, live in zip(lam.aug[0].parameters(), _first_copied(net).parameters(), strict=True):
        assert torch.equal(copied, live)
    last = lam(torch.zeros(2, *output_shapes(list(net.segments), 64)[1]))
    assert last.shape[1] == lam_width(net) and last.shape[2] == 2


def _first_copied(net: LocalNetwork) -> nn.Module:
    return net.plan.units[1].head.lam.followed[0].module(net.segments)


def lam_width(net: LocalNetwork) -> int:
    """Channels at the end of the last block (a tail may follow it)."""
    return blocks_of(net.segments)[-1].channels
