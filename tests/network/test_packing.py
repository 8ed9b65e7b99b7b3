"""Two tensors between blocks are packed into one, and nobody outside notices; three are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from framework.local.methods import mlaan
from framework.model import local_network
from framework.network import cut
from framework.network.packing import pack, unpack
from framework.runtime.errors import UserError
from tests.execution.test_routing import assert_equals_definition
from tests.network.test_segments import run
from tests.network.test_tracing import Sums
from tests.support import networks


class Twice(nn.Module):
    """Every block sees what the two before it gave; ``more`` tensors pass beside these."""

    def __init__(self, more: int = 0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleList(Sums() for _ in range(4))
        self.more = more

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y, *others = x.mean((2, 3), keepdim=True).sigmoid(), *(x + i for i in range(self.more))
        for block in self.blocks:
            x, y = block(x * y), x.mean((2, 3), keepdim=True).sigmoid()
            others = [other + y for other in others]
        return sum(others, x * y)


@pytest.fixture
def network() -> Twice:
    torch.manual_seed(0)
    return Twice()


@torch.no_grad()
def test_segments_equal_the_network_and_heads_read_the_map(network: Twice) -> None:
    images = torch.randn(3, 3, 8, 8)
    segments = cut(network, "block", image_size=8)
    assert [segment.name for segment in segments] == ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]
    for training in (True, False):
        network.train(training)
        assert torch.equal(run(segments, images), network(images))
    packed = segments[0](images)
    stem = network.stem(images)
    expected = network.blocks[0](stem * stem.mean((2, 3), keepdim=True).sigmoid())
    assert packed.shape == (3, 2 * 4 * 8 * 8)  # and what the next factor is made of
    assert torch.equal(segments[0].to_map(packed), expected)


@pytest.mark.parametrize("method", ["gim", "loco"])
def test_gradients_pass_both(network: Twice, method: str) -> None:
    net = local_network(network, method, image_size=8, cut="block").double().train()
    assert_equals_definition(net, networks.batch(net, size=4, image_size=8))


def test_cascaded_windows_and_copies_of_blocks(network: Twice) -> None:
    net = local_network(
        network, "mlaan", mlaan.Options(), image_size=8, num_classes=networks.CLASSES, cut="block"
    )
    assert_equals_definition(net.double().train(), networks.batch(net, size=4, image_size=8))


def test_what_is_unpacked_is_what_was_packed() -> None:
    maps, windows = torch.randn(2, 3, 4, 4), torch.randn(2 * 5, 7, 2)
    packed = pack([maps, windows], [1, 5])
    assert packed.shape == (2, 3 * 16 + 5 * 14)
    assert torch.equal(unpack(packed, 0, (1, 3, 4, 4)), maps)
    assert torch.equal(unpack(packed, 48, (5, 7, 2)), windows)


def test_images_of_another_size_are_refused(network: Twice) -> None:
    segments = cut(network, "block", image_size=8)
    with pytest.raises(UserError, match="Twice was cut for images of one size"):
        run(segments, torch.randn(2, 3, 12, 12))


def test_three_tensors_are_refused() -> None:
    with pytest.raises(
        UserError, match="Twice can't be cut into segments: more than two tensors pass between"
    ):
        cut(Twice(more=1), image_size=8)
