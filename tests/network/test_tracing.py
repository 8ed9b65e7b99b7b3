"""Any network is cut by what it computes: timm's of all kinds, a user's own, and what can't be cut is named."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from framework.local.methods import auglocal, hpff, mlaan
from framework.model import local_network
from framework.network import create, cut, own
from framework.network.structure import structure
from tests.execution.test_routing import assert_equals_definition
from tests.network.test_segments import SMALL, run
from tests.support import networks
from tests.support.marks import slow
from tests.support.networks import relative_error

#: name -> side of the images, segments of a "stage" and of a "block" cut
SAMPLE = {
    "vgg11": (32, 5, 8),
    "mobilevitv2_050": (64, 5, 9),
    "xcit_nano_12_p16_224": (64, 4, 14),
    "eva02_tiny_patch14_224": (224, 4, 12),
    "hgnetv2_b0": (64, 4, 5),
    "starnet_s050": (64, 4, 9),
    "ghostnet_050": (64, 4, 17),
    "fastvit_t8": (64, 4, 16),
    "pvt_v2_b0": (64, 4, 8),
    "resnetv2_18": (64, 4, 8),
    "levit_128s": (224, 3, 9),
    "convnextv2_atto": (64, 4, 12),
    "test_mambaout": (64, 4, 6),
    "rexnet_100": (64, 5, 17),
    "edgenext_xx_small": (64, 4, 12),
    "lcnetv2_small": (64, 4, 10),
    "repghostnet_050": (64, 4, 17),
    "dla46x_c": (64, 4, 4),
    "mobileone_s0": (64, 4, 42),
    "poolformerv2_s12": (64, 4, 12),
}
#: two tensors pass between their blocks, or are made beside them; the last has its tokens in an order of its own
ODD = {
    "pit_ti_224": (224, 3, 12),
    "tnt_s_legacy_patch16_224": (224, 4, 12),
    "gemma4_vit_167m": (96, 4, 16),
    "pnasnet5large": (96, 5, 17),
    "hiera_tiny_224": (224, 4, 12),
}


#: torchvision's -> stages; downsamplings between these belong to the next
TORCHVISION = {
    "swin_t": ["features.1", "features.3", "features.5", "features.7"],
    "convnext_tiny": ["features.1", "features.3", "features.5", "features.7"],
    "mobilenet_v3_small": ["features.1", "features.4", "features.7", "features.9", "features.12"],
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_stages_have_names_of_their_own(name: str) -> None:
    with torch.device("meta"):
        network: nn.Module = torchvision.models.get_model(name)
    assert [segment.name for segment in cut(network)] == TORCHVISION[name]


#: of the sample; they take longest
LARGE = ("vgg11", "mobileone_s0", "eva02_tiny_patch14_224", "repghostnet_050", "rexnet_100", "ghostnet_050")
LARGE += ("fastvit_t8", "levit_128s", "mobilevitv2_050", "pvt_v2_b0", "poolformerv2_s12", "hgnetv2_b0")


@pytest.mark.parametrize("name", [*sorted(SAMPLE.keys() - set(LARGE)), *slow([*LARGE, *ODD])])
@torch.no_grad()
def test_a_network_of_any_module_is_cut_and_equal(name: str) -> None:
    """Bit for bit in evaluation and training, and what stands between its modules can be copied and pickled."""
    side, stages, blocks = {**SAMPLE, **ODD}[name]
    torch.manual_seed(0)
    network = create(name)
    images = torch.randn(2, 3, side, side)
    parts = {count: cut(network, at, image_size=side) for at, count in (("stage", stages), ("block", blocks))}
    for training in (False, True):
        network.train(training)
        state = {key: tensor.clone() for key, tensor in network.state_dict().items()}
        torch.manual_seed(1)
        whole = network.forward_features(images)
        for count, segments in parts.items():
            network.load_state_dict(state)
            torch.manual_seed(1)
            assert torch.equal(run(segments, images), whole)
            assert len(segments) == count
    segments = parts[stages]
    network.eval()
    again = pickle.loads(pickle.dumps(copy.deepcopy(segments)))
    assert torch.equal(run(again, images), run(segments, images))
    assert again[0].backbone is again[-1].backbone and again[0].backbone is not network


class Sums(nn.Module):
    """A block whose input is added to its output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x).relu())


class Plain(nn.Module):
    """Four blocks; ``between`` acts after each but the last."""

    def __init__(self, between: Callable[[Plain, Tensor, int], Tensor]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleList(Sums() for _ in range(4))
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            x = block(x)
            x = self.between(self, x, i) if i < 3 else x
        return x


BETWEEN: dict[str, tuple[Callable[[Plain, Tensor, int], Tensor], list[str]]] = {
    "nothing": (lambda net, x, i: x, ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]),
    # the ReLU changes the block's output, so it belongs to the block
    "in place": (lambda net, x, i: x.relu_(), ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]),
    # a parameter that serves behind blocks 0 to 2 keeps what lies between its uses together
    "shared": (lambda net, x, i: x * net.scale, ["blocks.0", "blocks.2", "blocks.3"]),
    "in training": (
        lambda net, x, i: nn.functional.dropout(x, 0.5, net.training) if net.training else x,
        ["blocks.0", "blocks.1", "blocks.2", "blocks.3"],
    ),
    "by its size": (
        lambda net, x, i: x / x.shape[-1] * x.shape[0],
        ["blocks.0", "blocks.1", "blocks.2", "blocks.3"],
    ),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_a_users_own_module(name: str) -> None:
    """Its blocks are found, what stands between them is kept, and local units on it equal the definition."""
    between, expected = BETWEEN[name]
    torch.manual_seed(0)
    network = Plain(between)
    images = torch.randn(3, 3, 8, 8)
    segments = cut(network, "block", image_size=8)
    assert [segment.name for segment in segments] == expected
    for training in (True, False):
        network.train(training)
        torch.manual_seed(1)
        whole = network(images)
        torch.manual_seed(1)
        assert torch.equal(run(segments, images), whole)
    options = mlaan.Options(window=2, lam_on="none")
    net = local_network(network, "mlaan", options, image_size=8, num_classes=10, cut="block").double().train()
    if name != "in training":  # the definition draws other masks
        assert_equals_definition(net, networks.batch(net, size=4, image_size=8))


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "swin_tiny_patch4_window7_224"])
@pytest.mark.parametrize("method", ["mlaan", "man", *slow(["auglocal", "hpff", "loco", "infopro"])])
def test_methods_that_copy_blocks_work_on_tokens(name: str, method: str) -> None:
    torch.manual_seed(0)
    net = local_network(create(name, **SMALL[name]), method, image_size=64, num_classes=networks.CLASSES)
    assert_equals_definition(net.double().train(), networks.batch(net, size=4, image_size=64))


@pytest.mark.parametrize("name", ["densenet121", "shufflenetv2_50", "presnet50"])
def test_auglocals_blocks_are_as_wide_as_the_networks(name: str) -> None:
    """The width that a head ends with is one of a later block, read off that block's output."""
    network = create(name, **SMALL[name])
    net = local_network(network, "auglocal", auglocal.Options(depth=1), image_size=64, num_classes=10)
    widths: dict[str, int] = {}
    for segment in net.segments:
        for block in segment.blocks:
            module = network.get_submodule(block)
            module.register_forward_hook(lambda *call, name=block: widths.update({name: call[-1].shape[1]}))
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, 64, 64))
    for unit in net.plan.units[:-1]:
        linear = [m for m in unit.head.modules() if isinstance(m, nn.Linear)][-1]
        later = [widths[block] for segment in net.segments[unit.last + 1 :] for block in segment.blocks]
        assert linear.in_features in later


@pytest.mark.parametrize("side", [20, 28, 30, 36])
def test_hpff_takes_images_of_any_side(side: int) -> None:
    torch.manual_seed(0)
    net = local_network("resnet14", "hpff", hpff.Options(), image_size=side, num_classes=10, cut="block")
    assert torch.isfinite(net.double().train()(networks.batch(net, size=2, image_size=side)).loss)


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_features_are_what_the_network_gives(name: str) -> None:
    """Of every family: the tensor that timm's network without a classifier returns."""
    torch.manual_seed(0)
    size = SMALL[name].get("img_size", 64)
    net = local_network(create(name, **SMALL[name]), "gim", image_size=size).eval()
    images = torch.randn(2, 3, size, size)
    assert relative_error(net.features(images), net.backbone(images)) < 1e-6


@pytest.mark.parametrize("name", ["mobilenetv3_large_100", "convnext_atto"])
def test_the_last_head_trains_what_the_features_pass(name: str) -> None:
    """ConvNeXt's last norm and MobileNetV3's last convolution learn from the last unit, and keep one name."""
    torch.manual_seed(0)
    net = local_network(create(name, **SMALL[name]), "dgl", image_size=64, num_classes=networks.CLASSES)
    net.double().train()(networks.batch(net, size=4, image_size=64)).loss.backward()
    follows = net.segments[-1].follows
    assert follows
    for parameter in follows:
        gradient = net.backbone.get_parameter(parameter).grad
        assert gradient is not None and gradient.abs().max() > 0
    keys = [key for key in net.state_dict() if key.endswith(follows[0])]
    assert keys == [f"backbone.{follows[0]}"]


def test_a_network_in_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in ``network/own`` is a network that recipes can name; here torchvision's ResNet."""
    (tmp_path / "torchs.py").write_text(
        "from torch import nn\nfrom torchvision import models\n\n\ndef create(**arguments):\n"
        "    net = models.resnet18(**arguments)\n    net.fc = nn.Identity()\n    return net\n"
    )
    monkeypatch.setattr(own, "__path__", [str(tmp_path)])
    assert own.names() == ["torchs"]
    segments = cut(create("torchs"), image_size=64)
    assert [segment.name for segment in segments] == ["layer1", "layer2", "layer3", "layer4"]
    assert structure(create("torchs"), 64).tail.evaluation[-1] == "fc"


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "xcit_nano_12_p16_224", "levit_128s", "hiera_tiny_224"]
)
@torch.no_grad()
def test_the_map_of_a_boundary_lies_as_the_picture(name: str) -> None:
    """A patch that is changed changes the map most where it lies."""
    torch.manual_seed(0)
    first, *_ = cut(create(name).eval(), "block", image_size=224)
    images = 0.1 * torch.randn(1, 3, 224, 224)
    for row, column in ((3, 10), (11, 2)):
        changed = images.clone()
        changed[:, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] += 3
        difference = (first.to_map(first(changed)) - first.to_map(first(images))).abs().sum(1)[0]
        place, side = int(difference.argmax()), difference.shape[1]
        middle = [(number + 0.5) * side / 14 - 0.5 for number in (row, column)]
        assert max(abs(place // side - middle[0]), abs(place % side - middle[1])) <= side / 28 + 1


def test_what_is_made_between_modules_is_made_where_the_images_are() -> None:
    """Positions, for instance: not on the device of the recording."""
    network = create("qwen3_vit_88m", depth=1).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = network.forward_features(x)
    for segment in cut(network, "block", image_size=64):
        x = segment(x)
    assert torch.equal(x, expected)
