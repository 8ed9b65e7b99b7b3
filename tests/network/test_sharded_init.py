"""Networks that are built without ever being whole have the weights of those that are."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from framework import network as networks
from framework.config.loading import load
from framework.model import local_network, recipe_network
from framework.network.norm import RunningStatistics
from framework.network.recorded import Unrecordable
from framework.network.sharded_init import built_in_slices, fill, put
from tests.support import networks as small
from tests.support.marks import slow

SMALL = 256  # bytes; as good as all tensors of the small networks are larger


def state(net: nn.Module) -> dict[str, Tensor]:
    """Parameters and all buffers, also those that checkpoints leave out."""
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


def same_built_in_slices(
    make: Callable[[], nn.Module], large: int = SMALL, splits: tuple[int, ...] = (1, 2, 3)
) -> nn.Module:
    """Build a network twice, compare, and return that which was built in slices, filled."""
    torch.manual_seed(5)
    expected = state(make())
    drawn = torch.get_rng_state()
    torch.manual_seed(5)
    with built_in_slices(0, 1, large) as made:
        net = make()
    assert torch.equal(torch.get_rng_state(), drawn)
    found = state(net)
    assert list(found) == list(expected)
    assert any(tensor.is_meta for tensor in found.values())
    for name, tensor in found.items():
        assert tensor.shape == expected[name].shape
        for ranks in splits:
            parts = [replace(made, rank=rank, ranks=ranks).slice_of(tensor) for rank in range(ranks)]
            assert len({len(part) for part in parts}) == 1
            joined, whole = torch.cat(parts), expected[name].flatten()
            assert torch.equal(joined[: len(whole)], whole), name
            assert not joined[len(whole) :].any()
    fill(net, made)
    for name, tensor in state(net).items():
        assert tensor.dtype == expected[name].dtype
        assert tensor.stride() == expected[name].stride()
        assert tensor.requires_grad == expected[name].requires_grad
        assert torch.equal(tensor, expected[name]), name
    return net


@pytest.mark.parametrize(
    ("case", "splits"), [("gim", (3,)), *slow((case, (1, 2, 3)) for case in small.CASES)]
)
def test_methods(case: str, splits: tuple[int, ...]) -> None:
    """Heads, copies, teachers, replay buffers; the ViT's blocks are run to see whether they take any tokens."""
    same_built_in_slices(lambda: small.network(case), splits=splits)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"weight_init": "moco"}),  # parts of a matrix are initialized apart
        ("vit_base_patch16_siglip_224", {"depth": 2}),  # its own pooling attends
        ("resnet18", {}),
        ("convnext_atto", {}),
        ("swin_tiny_patch4_window7_224", {}),
        ("mixer_s32_224", {}),
        ("efficientnet_b0", {}),
        ("levit_128", {}),  # makes buffers on the device of others
        ("hiera_tiny_224", {}),  # is not initialized on the device meta
        ("presnet50", {}),
        ("shufflenetv2_50", {}),
    ],
)
def test_networks(name: str, arguments: dict[str, Any]) -> None:
    def make() -> nn.Module:
        backbone = networks.create(name, **arguments)
        return local_network(backbone, "gim", image_size=224, cut="stage")

    same_built_in_slices(make, 2**16, (3,))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("quickstart.yaml", ["train.ema=0.99", "network.sync_bn=true"]),
        ("quickstart_mlaan.yaml", []),
        ("byol_r50_300ep.yaml", []),
        ("mim_vitb16_800ep.yaml", ["network.args={depth: 3}"]),
        ("cifar10/fa_r20_cifar10.yaml", ["train.precision=fp16"]),
    ],
)
def test_recipes(recipe: str, overrides: list[str]) -> None:
    parsed = load([f"recipes/{recipe}", "data.path=unused", *overrides])
    same_built_in_slices(lambda: recipe_network(parsed, 10), 2**12, (3,))


@pytest.mark.slow
def test_filled_network_trains_as_ever() -> None:
    """The objects stay: segments, heads and the state's names lead to the weights that were put in."""
    torch.manual_seed(5)
    with built_in_slices(0, 1, SMALL) as made:
        net = small.network("dgl-1c2f")
    before = {name: id(parameter) for name, parameter in net.named_parameters()}
    fill(net, made)
    assert {name: id(parameter) for name, parameter in net.named_parameters()} == before
    RunningStatistics(net).remember()
    data = small.on("cpu", small.batch(net), torch.float32)
    expected = small.routed(small.network("dgl-1c2f"), data)
    found = small.routed(net, data)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Everything(nn.Module):
    """Ways to make weights."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.empty(48, 16)
        nn.init.trunc_normal_(weight, std=0.02)
        for rows in weight.chunk(3):
            nn.init.xavier_uniform_(rows)
        self.rows = nn.Parameter(weight)
        self.earlier = nn.Parameter(self.rows.detach().clone())
        with torch.no_grad():
            self.rows[0].zero_()
            self.rows[:, 1] = torch.arange(48.0)
            self.rows.mul_(self.earlier.std().item())
            self.rows[torch.tensor([3, 5])] = 2.0
            self.rows[[7, 8], 2] = self.rows[[1, 2], 3]
        self.orthogonal = nn.Parameter(nn.init.orthogonal_(torch.empty(16, 16)))
        self.later = copy.deepcopy(self.rows)
        self.register_buffer("queue", nn.functional.normalize(torch.randn(64, 8), dim=1))
        self.register_buffer("table", torch.from_numpy(np.linspace(0, 1, 512)).float().view(16, 32).T)
        own = torch.Generator().manual_seed(1)
        self.register_buffer("own", torch.rand(64, 4, generator=own) + torch.rand(64, 4, generator=own))
        self.register_buffer("order", torch.randperm(500))
        self.register_buffer("mask", torch.zeros(32, 32, device=self.rows.device).bernoulli_(0.3).bool())
        self.rows.data = self.rows.data.to("cpu").mul_(2.0)
        assert self.rows.to(torch.zeros(1)).data_ptr() == self.rows.data_ptr()
        deep = torch.ones(128)
        for _ in range(400):
            deep = deep * 1.01
        self.register_buffer("deep", deep)
        self.decay = torch.linspace(0, 1, 100).tolist()
        self.values = self.rows[4].tolist()


def test_ways_to_make_weights() -> None:
    net = same_built_in_slices(Everything)
    torch.manual_seed(5)
    whole = Everything()
    assert isinstance(net, Everything)
    assert (net.decay, net.values) == (whole.decay, whole.values)


def test_nothing_but_what_is_asked_for_has_memory() -> None:
    with built_in_slices(1, 4) as made:
        layer = nn.Linear(2**9, 2**10)
        copied = copy.deepcopy(layer)
    assert layer.weight.untyped_storage().device.type == copied.weight.untyped_storage().device.type == "meta"
    part = made.slice_of(copied.weight)
    assert part.untyped_storage().nbytes() == part.nbytes == 4 * layer.weight.numel() // 4


def test_tensor_without_values() -> None:
    with built_in_slices(0, 1) as made:
        blank = torch.empty(2**16, device="meta")
        layer = nn.Linear(2**8, 2**8)
        blank_too = nn.functional.one_hot(torch.zeros(9, device="meta", dtype=torch.int64), 5)
        with pytest.raises(Unrecordable, match="copy_"), torch.no_grad():
            layer.weight.copy_(blank.view(2**8, 2**8))
    for tensor in (blank, blank_too):
        with pytest.raises(Unrecordable, match="no values"):
            made.slice_of(tensor)


def test_put_keeps_the_object_and_its_attributes() -> None:
    with built_in_slices(1, 2) as made:
        layer = nn.Linear(2**8, 2**8)
    weight = layer.weight
    weight.mine = "too"  # type: ignore[attr-defined]
    put(weight, made.slice_of(weight))
    assert layer.weight is weight
    assert weight.shape == (2**15,)
    assert weight.requires_grad
    assert weight.mine == "too"  # type: ignore[attr-defined]


@pytest.mark.parametrize("file", slow(["weights.safetensors", "weights.pth"]))
def test_weights_from_files(file: str, tmp_path: Path) -> None:
    path = tmp_path / file
    weights = {name: tensor.clone() for name, tensor in networks.create("resnet14").state_dict().items()}
    if path.suffix == ".pth":
        torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in weights.items()}}, path)
    else:
        safetensors.torch.save_file(weights, path)
    with built_in_slices(0, 1, SMALL) as made:
        net = networks.create("resnet14", checkpoint_path=str(path))
    assert made.recording.mapped > 0.9 * sum(tensor.nbytes for tensor in weights.values())
    assert made.recording.kept == 0
    fill(net, made)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in net.state_dict().items())


MEASURED = """
import sys, threading, time
from pathlib import Path
import torch
from framework import network as networks
from framework.network.sharded_init import built_in_slices

def private():  # of this process, without files
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], private())

arguments = {"checkpoint_path": sys.argv[2]} if sys.argv[2:] else {}
networks.cut(networks.create("resnet14"))
done, before = threading.Event(), private()
peak = [before]
thread = threading.Thread(target=watch)
thread.start()
with built_in_slices(0, 8) as made:
    net = networks.create(sys.argv[1], **arguments)
    networks.outputs(networks.cut(net), 224)
slices = [made.slice_of(parameter) for parameter in net.parameters()]
done.set()
thread.join()
largest = max(parameter.nbytes for parameter in net.parameters())
print(peak[0] - before, sum(part.nbytes for part in slices), largest)
"""


@pytest.mark.slow
@pytest.mark.parametrize("from_file", [False, True])
def test_memory(from_file: bool, tmp_path: Path) -> None:
    """The slices, four tensors, and the 32 MiB after which the heap is trimmed; the whole takes 1.2 GiB."""
    arguments = ["vit_large_patch16_224"]
    if from_file:
        path = tmp_path / "weights.safetensors"
        safetensors.torch.save_file(networks.create(arguments[0]).state_dict(), path)
        arguments.append(str(path))
    run = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True, check=True
    )
    peak, slices, largest = map(int, run.stdout.split())
    assert slices < peak < slices + 4 * largest + 2**25
