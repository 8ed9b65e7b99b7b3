"""Counted activations reproduce the papers' memory ratios; show_plan says what it counted."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from framework.config import loading
from framework.cost import readable
from framework.cost.activations import LiveActivations
from framework.cost.counting import PlanCost, plan_cost
from framework.cost.flops import Flops
from framework.model import recipe_network
from framework.runtime.exit_status import EXIT_USAGE
from tests.support import networks
from tests.support.commands import run_tool
from tests.support.marks import slow

ROOT = Path(__file__).resolve().parents[2]


@cache
def cost(recipe: str, images: int = 2, *overrides: str) -> PlanCost:
    """Cost of a shipped recipe on a few images."""
    loaded = loading.load([str(ROOT / "recipes" / f"{recipe}.yaml"), *overrides])
    return plan_cost(loaded, loaded.data.num_classes or 10, images)


@pytest.mark.parametrize(
    ("recipe", "saving", "paper"),
    [
        *slow(
            [
                ("loco_r50_100ep", 1.28, 1.28),
                ("gim_r50_100ep", 2.07, 1.81),
                ("gim_pr50_100ep", 4.80, 4.56),
                ("loco_pr50_100ep", 2.54, 2.76),
                ("cifar10/mlaan_r32_k16_cifar10", 1.78, 1 / 0.777),
                ("cifar10/mlaan_r110_k55_cifar10", 6.08, 1 / 0.298),
            ]
        ),
    ],
)
def test_memory_saving(recipe: str, saving: float, paper: float) -> None:
    """End-to-end over the method. The count is exact, so neither more nor less than it was passes unseen.

    It is LoCo's and GIM's figure within 15 %; MLAAN's printed ratios hold the allocator's fixed share, so ours are
    higher, at most twice (at the paper's batch another 2 % higher: the weights of pulled copies don't grow with it).
    """
    counted = cost(recipe, 2, "train.precision=fp32").memory_saving
    assert counted == pytest.approx(saving, rel=0.005)
    assert 0.9 * paper < counted < (2 if "mlaan" in recipe else 1.15) * paper


def test_counts_without_values_are_those_of_a_real_step() -> None:
    overrides = ["network.name=resnet14", "data.image_size=16"]
    recipe = loading.load([str(ROOT / "recipes" / "quickstart.yaml"), *overrides])
    net = recipe_network(recipe, networks.CLASSES)
    data = networks.batch(net, size=4)
    data = data._replace(images=data.images.float())
    with LiveActivations([*net.parameters(), *net.buffers(), data.images]) as live:
        net(data).loss.backward()
    counted = plan_cost(recipe, networks.CLASSES, 4)
    assert counted.peak_activation_bytes == live.peak == max(u.activation_bytes for u in counted.units)


@pytest.mark.parametrize("objective", ["moco", "byol"])
def test_a_teacher_costs_one_forward_pass(objective: str) -> None:
    """Of segments and projections, without predictors; with MoCo the two sides have one view each."""
    taught = (f"method.head.objective={objective}", "network.name=resnet14", "data.image_size=16")
    sizes = ("method.head.proj_hidden=32", "method.head.dim=16", "method.head.pred_hidden=8")
    counted, images = cost("quickstart", 4, *taught, *sizes), 4 if objective == "moco" else 8
    units, segments, teacher = counted.units, counted.segments, counted.teacher
    assert teacher is not None
    scores = 0 if objective == "byol" else 65536 * 16
    predictors = 2 * 2 * 16 * 8 if objective == "byol" else 0
    head_flops = sum(u.flops - images * (predictors + 2 * scores) for u in units)
    assert sum(teacher.flops) == sum(s.flops for s in segments) + head_flops
    assert teacher.weight_bytes == 4 * teacher.parameters
    # Predictors have two linear layers, the first without bias, and BatchNorm between.
    own = sum(u.parameters - (2 * 16 * 8 + 16 + 2 * 8 if objective == "byol" else 0) for u in units)
    assert teacher.parameters == sum(s.parameters for s in segments) + own
    assert teacher.feature_bytes == 4 * images * 16 * 16 * 16  # of the first segment


QUICK = "cifar10/dgl_r32_k16_cifar10"


@pytest.mark.parametrize("method", ["dfa", "fa", "scpl"])
def test_what_is_fed_back_otherwise_costs_the_same_forward(method: str) -> None:
    """The error of dfa's head on top is a gradient in the middle of a forward pass."""
    counted, plain = (
        cost("cifar10/bp_r32_cifar10", 2, f"method.name={method}"),
        cost("cifar10/bp_r32_cifar10"),
    )
    assert [s.flops for s in counted.segments] == [s.flops for s in plain.segments]
    assert counted.units[-1].flops == 2 * 2 * 64 * 10  # two images


def test_gradients_count_as_operations_too() -> None:
    x, weight = torch.randn(5, 7, requires_grad=True), torch.randn(3, 7, requires_grad=True)
    with Flops() as counted:
        torch.autograd.grad(torch.nn.functional.linear(x, weight).sum(), [x, weight])
    assert counted.total == 3 * 2 * 5 * 7 * 3


@pytest.mark.parametrize(
    "override",
    [
        *slow(["execution.compile=true"]),  # compiled kernels would run on tensors that have no values
        *slow(["execution.cuda_graph=true"]),
        *slow(["faults.nonfinite=skip"]),
        *slow(["network.sync_bn=true"]),
        *slow(["method.async_mode=buffer"]),
    ],
)
def test_what_changes_only_the_execution_changes_no_count(override: str) -> None:
    assert cost(QUICK, 2, "network.sync_bn=false", override) == cost(QUICK, 2)


@pytest.mark.slow
def test_fp16_is_counted_as_the_other_type_of_two_bytes() -> None:
    """Its loss scales have no values here, and the host reads none."""
    assert cost(QUICK, 2, "train.precision=fp16") == cost(QUICK, 2, "train.precision=bf16")


@pytest.mark.parametrize("module", [0, *slow([1, 15])])
def test_a_module_that_is_trained_alone_costs_what_it_costs_in_the_whole_plan(module: int) -> None:
    whole, alone = cost(QUICK), cost(QUICK, 2, "method.async_mode=sequential", f"method.module={module}")
    assert alone.segments == whole.segments[module : module + 1]
    assert alone.units == (replace(whole.units[module], first=0, last=0),)
    assert alone.peak_activation_bytes == whole.units[module].activation_bytes
    assert alone.end_to_end_activation_bytes == whole.end_to_end_activation_bytes


@pytest.mark.parametrize(
    ("numbers", "units", "shown"),
    [
        ([0, 2**19, 2**30 - 2**20], readable.BYTES, ("MiB", ["0.00", "0.50", "1,023.00"])),
        ([2**29, 3 * 2**30], readable.BYTES, ("GiB", ["0.50", "3.00"])),
        ([1e6], readable.FLOPS, ("GFLOP", ["0.00"])),
        ([5e11, 1.25e12], readable.FLOPS, ("TFLOP", ["0.50", "1.25"])),
    ],
)
def test_a_column_has_one_unit_that_can_be_read(
    numbers: list[float], units: readable.Units, shown: tuple[str, list[str]]
) -> None:
    assert readable.column(numbers, units) == shown
    assert readable.text(1.5 * 2**30, readable.BYTES) == "1.50 GiB"


def test_flops_of_resnet_50_are_the_published_ones() -> None:
    """4.089 G multiply-adds an image (torchvision's table has 4.09), less the classifier's 2 M."""
    counted = cost("simclr_r50_100ep", 1)
    per_image = sum(s.flops for s in counted.segments) / 2 / counted.images
    assert per_image / 1e9 == pytest.approx(4.089 - 0.002, abs=0.001)


def test_show_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = ["--ranks", 2, "--json", tmp_path / "plan.json", "--png", tmp_path / "plan.png"]
    assert run_tool("show_plan", ROOT / "recipes/quickstart.yaml", "method.window=3", *outputs) == 0
    plan, printed = json.loads((tmp_path / "plan.json").read_text()), capsys.readouterr().out
    assert [s["name"] for s in plan["segments"]] == ["layer1", "layer2", "layer3"]
    assert [(u["first"], u["last"]) for u in plan["units"]] == [(0, 2)]
    assert plan["memory_saving"] < 1 and f"{1 / plan['memory_saving']:.2f}x more memory" in printed
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    ranks = {(r["engine"], r["training"]): r for r in plan["ranks"]}
    assert len(ranks) == 8 and "2 ranks, 32 images each in a micro-batch, optim.name=sgd" in printed
    whole, sliced = ranks["ddp", "local"], ranks["fsdp", "local"]
    assert whole["optimizer"] == pytest.approx(2 * sliced["optimizer"], rel=0.01)
    assert whole["activations"] == sliced["activations"]
    assert whole["activations"] == pytest.approx(plan["peak_activation_bytes"] / 2, rel=0.01)


def test_show_plan_names_what_is_impossible(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ROOT / "recipes/cifar10/mlaan_r32_k16_cifar10.yaml"
    assert run_tool("show_plan", recipe, "network.cut=40") == EXIT_USAGE
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "network.cut=40" in error
