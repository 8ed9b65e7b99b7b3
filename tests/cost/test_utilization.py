"""FLOPs of a training step against products of shapes, and what they are of a GPU's peak."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from framework.config import loading
from framework.config.recipe import Recipe
from framework.cost.counting import step_flops
from framework.cost.utilization import peak_flops, utilization
from framework.data.batch import Batch
from framework.model import recipe_network
from tests.support.marks import slow
from tests.support.runs import ROOT

H100 = "NVIDIA H100 80GB HBM3"


def recipe(name: str, *overrides: str) -> Recipe:
    small = ("network.name=resnet8", "data.image_size=16", "train.batch_size=64", "data.path=nowhere")
    return loading.load([str(ROOT / "recipes" / name), *small, *overrides])


def by_hand(of: Recipe, images: int) -> int:
    """Convolutions and linear layers: forward, weights' gradient, and, where the input has one, its gradient."""
    net, total = recipe_network(of, 10), 0

    def count(module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal total
        total += 2 * output.numel() * module.weight[0].numel() * (3 if inputs[0].requires_grad else 2)

    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    pixels = torch.randn(images * net.plan.views, 3, of.data.image_size, of.data.image_size)
    net(Batch(pixels, torch.zeros(images, dtype=torch.int64), net.plan.views))
    return total


@pytest.mark.parametrize("precision", ["fp32", *slow(["bf16", "fp16"])])
def test_a_step_costs_what_its_layers_cost(precision: str) -> None:
    of = recipe("quickstart_mlaan.yaml", "method.name=dgl", f"train.precision={precision}")
    assert step_flops(of, 10, images=8) == by_hand(of, images=8)


@pytest.mark.slow
def test_contrasts_cost_little_more() -> None:
    of = recipe("quickstart.yaml", "method.name=gim")
    assert 1 < step_flops(of, 10, images=8) / by_hand(of, images=8) < 1.01


@pytest.mark.parametrize(
    ("name", "bf16", "fp16", "fp32"),
    [
        (H100, 989, 989, 495),
        ("NVIDIA H100 PCIe", 756, 756, 378),
        ("NVIDIA H200", 989, 989, 495),
        ("NVIDIA H20", 148, 148, 74),
        ("NVIDIA A100-SXM4-80GB", 312, 312, 156),
        ("NVIDIA A10G", 70, 70, 35),
        ("NVIDIA A10", 125, 125, 62.5),
        ("NVIDIA L4", 121, 121, 60.5),
        ("NVIDIA L40S", 362, 362, 183),
        ("Tesla V100-SXM2-16GB", None, 125, 15.7),
        ("Tesla V100-PCIE-32GB", None, 112, 14),
        ("Tesla T4", None, 65, 8.1),
        ("NVIDIA GeForce RTX 4090", 165.2, 165.2, 82.6),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None, None),
        ("AMD EPYC 7763 64-Core Processor", None, None, None),
    ],
)
def test_peaks_are_found_by_a_gpus_name(
    name: str, bf16: float | None, fp16: float | None, fp32: float | None
) -> None:
    found = [peak_flops(name, precision) for precision in ("bf16", "fp16", "fp32")]
    assert found == [peak and pytest.approx(1e12 * peak) for peak in (bf16, fp16, fp32)]


@pytest.mark.slow
def test_utilization_is_of_all_gpus_together(tmp_path: Path) -> None:
    """The weights that a training begins with may be gone when it goes on."""
    of = recipe("quickstart_mlaan.yaml", "method.name=dgl", "train.precision=bf16", "train.accumulation=2")
    gone = replace(of, network=replace(of.network, args={"checkpoint_path": str(tmp_path / "gone.pth")}))
    found = utilization(gone, 10, H100, devices=4)
    assert found is not None
    a_second = by_hand(of, images=8) / 8 * 1000
    assert found.at(1000) == pytest.approx(a_second / (4 * 989e12))
    assert utilization(of, 10, "some other GPU", devices=4) is None


LATER = ["quickstart.yaml", "mim_vitb16_800ep.yaml", "cifar10/scpl_r18_cifar10.yaml", "mocov2_r50_200ep.yaml"]


@pytest.mark.slow
@pytest.mark.parametrize("name", LATER)
def test_other_recipes_are_counted(name: str) -> None:
    of = loading.load([str(ROOT / "recipes" / name), "data.path=nowhere"])
    assert utilization(of, 10, H100, devices=8) is not None


@pytest.mark.slow
def test_a_step_from_replay_buffers_is_counted() -> None:
    of = recipe("quickstart_mlaan.yaml", "method.name=dgl", "method.async_mode=buffer")
    assert utilization(of, 10, H100, devices=1) is not None


@pytest.mark.slow
def test_what_can_not_be_counted_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As networks of one's own whose code looks at values."""
    of = recipe("quickstart.yaml")
    looks = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: looks(self, x * float(x.sum().item())))
    assert utilization(of, 10, H100, devices=1) is None
    assert "can't be counted" in caplog.text and "\n" not in caplog.messages[0]
