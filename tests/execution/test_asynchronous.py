"""Modules that do not wait for each other, against DGL's loop written out, and against plain DGL."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from framework.checkpoints.folder import read_weights
from framework.config import loading
from framework.data.batch import Batch
from framework.execution import LocalNetwork
from framework.local import Execution, LocalUnit, Plan
from framework.local.head import Head
from framework.local.methods import dgl, infopro
from framework.model import local_network, parts
from framework.pipeline.scheduling.balance import place
from framework.runtime.errors import UserError
from framework.tracking.metric_log import read_log
from framework.training.run import train as train_recipe
from tests.support import networks
from tests.support.marks import slow
from tests.support.networks import CLASSES
from tests.support.pool import Pool


def network(**options: Any) -> LocalNetwork:
    torch.manual_seed(0)
    chosen = dgl.Options(**options)
    return local_network("resnet8", "dgl", chosen, image_size=16, num_classes=CLASSES, cut="block").train()


def train(net: LocalNetwork, steps: int, start: int = 0) -> list[Tensor]:
    """SGD with momentum on float64; unit losses of every step."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(start, start + steps):
        output = net(networks.batch(net, seed=step))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.unit_losses)
    return losses


@pytest.mark.parametrize("method", ["dgl", "infopro"])
def test_replay_buffers_of_one_batch_in_order_are_the_synchronous_method(method: str) -> None:
    """Bit for bit."""
    make: Callable[..., Any] = {"dgl": dgl.Options, "infopro": infopro.Options}[method]
    nets = []
    for options in (make(), make(async_mode="buffer", buffer_size=1, buffer_order="sequence")):
        torch.manual_seed(0)
        net = local_network("resnet8", method, options, image_size=16, num_classes=CLASSES, cut="block")
        nets.append(net.double().train())
    assert all(torch.equal(a, b) for a, b in zip(train(nets[0], 4), train(nets[1], 4), strict=True))
    ours = nets[1].state_dict()
    assert all(torch.equal(ours[name], value) for name, value in nets[0].state_dict().items())


class Module(nn.Module):
    """One of DGL's workers: a segment, its head, an optimizer and a buffer of its own."""

    def __init__(self, net: LocalNetwork, number: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*net.segments[number].modules())
        self.head = net.plan.units[number].head
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        self.buffer: list[list[Any]] = []

    def turn(self, x: Tensor, batch: Batch) -> tuple[float, Tensor]:
        out = self.layers(x)
        loss = self.head(out, batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach()), out.detach()

    def draw(self) -> tuple[Tensor, Batch]:
        least = min(uses for _, _, uses in self.buffer)
        entry = [e for e in self.buffer if e[2] == least][-1]
        entry[2] += 1
        return entry[0], entry[1]


@pytest.mark.parametrize("size", [1, 3])
def test_a_random_order_is_dgls_loop(size: int) -> None:
    """With an optimizer a module that steps at once, as in the authors' code."""
    ours = network(async_mode="buffer", buffer_size=size).double()
    theirs = network().double()
    workers = [Module(theirs, number) for number in range(3)]
    found = train(ours, 8)
    stale = 0
    for step in range(8):
        data = networks.batch(theirs, seed=step)
        order = list(range(3)) if step == 0 else np.random.default_rng(step).permutation(3).tolist()
        losses = {}
        for number in order:
            x, batch = (data.images, data) if number == 0 else workers[number].draw()
            stale += batch is not data
            losses[number], out = workers[number].turn(x, batch)
            if number < 2:
                workers[number + 1].buffer = [*workers[number + 1].buffer, [out, batch, 0]][-size:]
        assert [losses[n] for n in range(3)] == pytest.approx(found[step].tolist(), rel=1e-12)
    assert stale > 3
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(mine, other, rtol=1e-12), name


def test_emptied_replay_buffers_fill_from_the_bottom() -> None:
    net = network(async_mode="buffer", buffer_size=3)
    assert net.turns is not None
    assert net.turns.order() == [0, 1, 2]
    train(net.double(), 5)
    orders = {tuple(net.turns.order())}
    for _ in range(8):
        net.turns.taken += 1
        orders.add(tuple(net.turns.order()))
    assert len(orders) > 2
    net.clear_replay_buffers()
    assert net.turns.order() == [0, 1, 2]
    assert "turns.taken" in net.state_dict()


def test_windows_can_not_wait_for_nobody() -> None:
    units = [LocalUnit(f"u{i}", max(0, i - 1), i, Head()) for i in range(3)]
    shared = Head()
    for plan in (units, [LocalUnit(f"u{i}", i, i, shared) for i in range(3)]):
        with pytest.raises(
            UserError, match=r"async_mode: .* by replay buffer only where every module has a unit"
        ):
            Plan(tuple(plan), 3, execution=Execution("replay buffer"))


def test_modules_one_after_another_are_trained_on_frozen_outputs() -> None:
    """Against a plain loop on the outputs of the lower modules in evaluation mode."""
    source = network().double()
    for number in range(3):
        theirs = copy.deepcopy(source)
        ours = network(async_mode="sequential", module=number).double()
        ours.backbone.load_state_dict(source.backbone.state_dict())
        found = train(ours, 4)
        below = nn.Sequential(*(m for segment in theirs.segments[:number] for m in segment.modules())).eval()
        worker = Module(theirs, number)
        for step in range(4):
            data = networks.batch(theirs, seed=step)
            with torch.no_grad():
                x = below(data.images)
            loss, _ = worker.turn(x, data)
            assert found[step].tolist() == pytest.approx([loss], rel=1e-12)
        expected = theirs.backbone.state_dict()
        for name, value in ours.backbone.state_dict().items():
            assert torch.allclose(value, expected[name], rtol=1e-12, atol=1e-14), name
        assert [p.requires_grad for p in ours.backbone.parameters()].count(True) == len(
            list(worker.layers.parameters())
        )
        source.backbone.load_state_dict(expected)
    with pytest.raises(UserError, match=r"method.module=3: the network has modules 0 to 2"):
        network(async_mode="sequential", module=3)


def test_a_module_is_trained_alone_only_one_after_another(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"method.module=1: goes with method.async_mode=sequential"):
        loading.load(arguments(tmp_path, "method.module=1"))


SHORT = [
    "data.prepare=digits",
    "data.image_size=8",
    "data.workers=0",
    "network.name=resnet8",
    "network.cut=3",
]
SHORT += ["network.sync_bn=true", "train.epochs=1", "train.batch_size=64", "optim.lr=0.05", "views.pad=1"]
SHORT += ["optim.warmup_epochs=0", "checkpoint.every_steps=2"]


def run(argv: list[str]) -> list[str]:
    """Every run that a recipe stands for, on this rank; their folders."""
    folders = []
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        for part in parts(loading.load(argv)):
            train_recipe(part)
            folders.append(part.run_dir)
    return folders


def arguments(folder: Path, *overrides: str, method: str = "dgl") -> list[str]:
    recipe = Path(__file__).resolve().parents[2] / "recipes" / "cifar10" / f"{method}_r32_k8_cifar10.yaml"
    return [str(recipe), f"data.path={folder / 'digits'}", f"run_dir={folder / 'run'}", *SHORT, *overrides]


def model(folder: Path, step: int) -> dict[str, Tensor]:
    return dict(read_weights(folder / "run" / "checkpoints" / f"step-{step:08d}"))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["deepspeed", "fsdp"])
def test_a_resumed_run_with_replay_buffers_is_bitwise_that_of_an_undisturbed_one(
    tmp_path: Path, pool: Callable[[int], Pool], engine: str
) -> None:
    """On two ranks, cut off at a checkpoint, where the replay buffers are emptied in either run."""
    common = [f"engine={engine}", "method.async_mode=buffer", "method.buffer_size=3"]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    pool(2).run(run, arguments(straight, *common, "train.max_steps=6"))
    pool(2).run(run, arguments(broken, *common, "train.max_steps=4"))
    pool(2).run(run, arguments(broken, *common, "train.max_steps=6"))
    ours, theirs = model(broken, 6), model(straight, 6)
    assert ours.keys() == theirs.keys() and ours["turns.taken"] == 6
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize(
    ("engine", "method"), slow([("deepspeed", "dgl"), ("fsdp", "dgl"), ("deepspeed", "infopro")])
)
def test_a_sequential_recipe_trains_module_after_module(
    tmp_path: Path, pool: Callable[[int], Pool], engine: str, method: str
) -> None:
    sequential = ("method.async_mode=sequential", "train.max_steps=3", "evaluate.every_epochs=1")
    argv = arguments(tmp_path, f"engine={engine}", *sequential, method=method)
    folders = [Path(folder) for folder in pool(2).run(run, argv)[0]]
    assert [folder.name for folder in folders] == ["module-00", "module-01", "module-02"]
    backbones = [load_file(folder / "backbone.safetensors") for folder in folders]
    for number, name in enumerate(("layer1", "layer2", "layer3")):
        for key in backbones[0]:
            if key.startswith(name) and key.endswith("weight"):
                values = [backbone[key] for backbone in backbones]
                same = [torch.equal(a, b) for a, b in pairwise(values)]
                assert same == [i + 1 != number for i in range(2)], key  # moves in its own run alone
    scored = ["test_top1" in json.loads((folder / "result.json").read_text()) for folder in folders]
    assert scored == [method == "dgl", method == "dgl", True]  # InfoPro's lower heads have a decoder, too
    pool(2).run(run, argv)  # goes on from the end of each module
    for folder in folders:
        assert sum("losses" in entry for entry in read_log(folder / "metrics.jsonl")) == 3


def test_a_pipeline_refuses_what_needs_one_process() -> None:
    options = dgl.Options(async_mode="buffer")
    net = local_network("resnet8", "dgl", options, image_size=16, num_classes=CLASSES, cut="block")
    recipe = loading.load([str(Path(__file__).parents[2] / "recipes/quickstart.yaml"), "pipeline.stages=2"])
    with pytest.raises(UserError, match=r"method\.async_mode=buffer: must be none with pipeline.stages=2"):
        place(recipe, net, CLASSES)
