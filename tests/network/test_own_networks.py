"""Networks as people write them: what their code does between layers is done by the segments, or they are refused."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from framework.network import create, cut, own
from framework.runtime.errors import UserError
from tests.network.test_segments import run


class Blocks(nn.Module):
    """A stem and two blocks; variants do more between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(2)
        )
        self.register_buffer("mean", torch.zeros(1, 8, 1, 1))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def between(self, x: Tensor) -> Tensor:
        """On the output of the stem."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.stem(x))
        for layer in self.layers:
            x = layer(x)
        return x


class Counts(Blocks):
    """Its own count of training passes, on which nothing depends."""

    def between(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += 1
        return x


class Centers(Blocks):
    """Subtracts a running mean that it keeps itself."""

    def between(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean((0, 2, 3), keepdim=True))
        return x - self.mean


class Assigns(Blocks):
    """Writes into a part of a tensor."""

    def between(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, :4] = 0.5 * x[:, 4:]
        return x


class ChangesAView(Blocks):
    """Changes a tensor by way of its parts."""

    def between(self, x: Tensor) -> Tensor:
        x = x.clone()
        part = x[:, :4]
        part += 1.0
        x[:, 2].mul_(0.3)
        return x


@pytest.mark.parametrize("network", [Counts(), Centers(), Assigns(), ChangesAView()])
@torch.no_grad()
def test_what_stands_between_layers_is_done_once(network: Blocks) -> None:
    """Outputs and buffers are bitwise the network's, after two passes in training and one in evaluation."""
    whole = copy.deepcopy(network)
    segments = cut(network, "block", image_size=8)
    images = torch.randn(3, 4, 3, 8, 8)
    for mode, batch in zip((True, True, False), images, strict=True):
        network.train(mode)
        whole.train(mode)
        assert torch.equal(run(segments, batch), whole(batch))
    for name, buffer in whole.state_dict().items():
        assert torch.equal(network.state_dict()[name], buffer), name


class Skips(Blocks):
    def between(self, x: Tensor) -> Tensor:
        return x if random.random() < 0.5 else -x


class Replaces(Blocks):
    def between(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        return x


class Masks(Blocks):
    def between(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[2:], device=x.device)
        mask[:4] = 0
        return x * mask


class Looks(Blocks):
    def between(self, x: Tensor) -> Tensor:
        return x if x.mean().item() > 0 else -x


class Labels(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).argmax(1)


class Volumes(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :, None]


class Gray(Blocks):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)


class Scripted(Blocks):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(torch.jit.script(layer) for layer in self.layers)


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (Skips(), "draws random numbers of Python or NumPy; use PyTorch's"),
        (Replaces(), "sets count to another tensor; change it in place (copy_)"),
        (Masks(), "changes a tensor that does not depend on the images in place"),
        (Looks(), "can't be recorded: Tensor.item()"),
        (Labels(), "its features are torch.int64, and must be real numbers"),
        (Volumes(), ", and must be maps (N, C, H, W), tokens (N, L, C) or vectors (N, D)"),
        (Gray(), "its code fails on images of three channels"),
        (nn.Flatten(), "it has no parameters"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_can_not_be_recorded_is_refused(network: nn.Module, reason: str) -> None:
    state = random.getstate()
    with pytest.raises(UserError) as refused:
        cut(network, "block")
    assert f"{type(network).__name__} can't be cut into segments: " in str(refused.value)
    assert reason in str(refused.value) and "\n" not in str(refused.value)
    assert random.getstate() == state


@pytest.mark.filterwarnings("ignore:`torch.jit.script")
def test_compiled_modules_are_refused() -> None:
    with pytest.raises(UserError, match=r"can't be cut into segments: layers.0 is compiled by torch.jit"):
        cut(Scripted())


@pytest.mark.parametrize(
    ("name", "made", "reason"),
    [
        ("a_list", "[1]", "create() gives list, must be a torch.nn.Module"),
        ("lazy", "nn.Sequential(nn.LazyConv2d(4, 3))", "0.weight has no shape yet"),
    ],
)
def test_what_a_file_makes_must_be_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, made: str, reason: str
) -> None:
    (tmp_path / f"{name}.py").write_text(f"from torch import nn\n\ndef create():\n    return {made}\n")
    monkeypatch.setattr(own, "__path__", [*own.__path__, str(tmp_path)])
    with pytest.raises(UserError) as refused:
        create(name)
    assert f"network.name={name}: {reason}" in str(refused.value)
