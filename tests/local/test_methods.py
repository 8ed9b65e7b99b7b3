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
from framework.local import LocalUnit, NetworkInfo, Plan
from framework.local.head import Head
from framework.local.heads import Classifier, Projection
from framework.local.methods import auglocal, blockwise, dgl, infopro, loco, mlaan
from framework.local.objectives import CrossEntropy, SupCon
from framework.local.reconstruction import Reconstruction
from framework.local.resizing import ResizedConv
from framework.model import local_network
from framework.network import Shape, create, cut
from framework.network.layers import GlobalAveragePool
from framework.runtime.errors import UserError
from tests.support import networks
from tests.support.networks import CLASSES, modules_of, relative_error


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
        lambda: Plan((LocalUnit("u", 0, 5, Nosy()),), 6),
        "its head reads segment 6, and the network has segments 0..5",
    ),
    (lambda: build("mlaan", mlaan.Options(window=7)), "window=7: the network has 6 segments, so 1 to 6"),
    (
        lambda: build("mlaan", mlaan.Options(lam_blocks={"layer2.1": ["layer3.0", "layer2.0"]})),
        "lam_blocks.layer2.1: layer2.0 is no later block; layer3.0, layer3.1 are",
    ),
    (
        lambda: build("mlaan", mlaan.Options(window=2, lam_blocks={"layer1.1": ["layer3.0"]})),
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
    (
        lambda: build("dgl", dgl.Options(head=Classifier("2c9f"))),
        "Classifier('2c9f'): its kind must be one of linear, mlp_sr",
    ),
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


def test_blockwise_expands_pools_and_projects_every_segment() -> None:
    """Siddiqui et al.: 1x1 convolution, BatchNorm, ReLU, pooling, three layers; the published numbers are defaults."""
    published = blockwise.Options()
    assert (published.noise, published.loss_scale, published.head.expand) == (0.25, 0.024, 2048)
    net = networks.network("blockwise")
    assert [(unit.first, unit.last, unit.weight) for unit in net.plan.units] == [
        (i, i, 0.024) for i in range(3)
    ]
    for unit, channels in zip(net.plan.units, (16, 32, 64), strict=True):
        trunk = list(unit.head.trunk)  # type: ignore[call-overload]
        assert [type(m) for m in trunk[:4]] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, GlobalAveragePool]
        assert (trunk[0].in_channels, trunk[0].out_channels, trunk[0].kernel_size) == (channels, 32, (1, 1))
        widths = [(m.in_features, m.out_features) for m in trunk if isinstance(m, nn.Linear)]
        assert widths == [(32, 32), (32, 32), (32, 16)]


def test_scpl_contrasts_below_and_classifies_on_top() -> None:
    net = networks.network("scpl").double()
    data = networks.batch(net)
    assert [type(unit.head.objective) for unit in net.plan.units] == [SupCon, SupCon, CrossEntropy]
    x, losses = data.images, []
    for segment, unit in zip(net.segments, net.plan.units, strict=True):
        x = segment(x)
        losses.append(by_hand_supcon(unit.head, x, data) if segment is not net.segments[-1] else None)
    found = net.eval().train()(data).unit_losses
    assert torch.allclose(found[:2], torch.stack(losses[:2]))  # type: ignore[arg-type]


def by_hand_supcon(head: Head, x: Tensor, data: Batch) -> Tensor:
    """Khosla et al., Eq. 2, with temperature 0.1, of an MLP of the flattened map."""
    first, _, second = list(head.trunk)[1:]  # type: ignore[call-overload]
    z = F.normalize(second(F.relu(first(x.reshape(len(x), -1)))), dim=1)
    similar, labels, losses = torch.exp(z @ z.T / 0.1), data.labels, []
    assert labels is not None
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        positives = [j for j in others if labels[j] == labels[i]]
        if positives:
            total = similar[i, others].sum()
            losses.append(-torch.stack([torch.log(similar[i, j] / total) for j in positives]).mean())
    return torch.stack(losses).mean()
