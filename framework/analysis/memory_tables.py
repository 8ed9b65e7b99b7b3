"""Activation memory beside the papers' numbers: LoCo Tables 6 and 7, MLAAN Table 3."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from framework.analysis.pictures import dress, run_colors
from framework.config import loading
from framework.config.recipe import Recipe
from framework.cost import counting
from framework.data.batch import Batch
from framework.model import recipe_network
from framework.tracking.environment import ROOT


class Published(NamedTuple):
    """A row of a paper.

    Attributes:
        table: where it stands.
        network: as printed.
        method: as printed.
        recipe: ours, a file of ``recipes``.
        images: on one device.
        saving: memory of end-to-end training / of the method.
        gigabytes: end-to-end and method, where the paper prints them.
    """

    table: str
    network: str
    method: str
    recipe: str
    images: int
    saving: float
    gigabytes: tuple[float, float] | None = None


def _mlaan(network: str, recipe: str, images: int, end_to_end: float, method: float) -> Published:
    return Published(
        "MLAAN Table 3", network, "MLAAN", recipe, images, end_to_end / method, (end_to_end, method)
    )


PUBLISHED = (
    Published("LoCo, text", "ResNet-50", "GIM", "gim_r50_100ep", 32, 1.81),
    Published("LoCo, text", "ResNet-50", "LoCo", "loco_r50_100ep", 32, 1.28),
    Published("LoCo Table 7", "PResNet-50", "GIM", "gim_pr50_100ep", 32, 4.56),
    Published("LoCo Table 7", "PResNet-50", "LoCo", "loco_pr50_100ep", 32, 2.76),
    _mlaan("ResNet-32 (K=16)", "cifar10/mlaan_r32_k16_cifar10", 1024, 3.37, 2.62),
    _mlaan("ResNet-110 (K=55)", "cifar10/mlaan_r110_k55_cifar10", 1024, 9.26, 2.76),
    _mlaan("ResNet-34 (K=17)", "mlaan_r34", 128, 10.74, 9.09),
    _mlaan("ResNet-101 (K=34)", "mlaan_r101", 64, 20.64, 17.93),
    _mlaan("ResNet-152 (K=51)", "mlaan_r152", 128, 26.29, 23.01),
)

#: LoCo Table 6: per cent of memory and of FLOPs, stage by stage
STAGES = {
    "ResNet-50": ("loco_r50_100ep", (43.64, 29.09, 21.82, 5.45), (19.39, 25.09, 35.80, 19.73)),
    "PResNet-50": (
        "loco_pr50_100ep",
        (15.46, 10.96, 19.48, 17.31, 19.48, 17.31),
        (13.50, 14.63, 14.77, 16.62, 20.45, 20.04),
    ),
}


@dataclass(frozen=True)
class Memory:
    """What a plan was found to take.

    Attributes:
        counted: bytes of activations that autograd keeps at once, (end-to-end, method).
        allocated: peak of PyTorch's allocator in a training step on a GPU, the same two; ``None`` without one.
    """

    counted: tuple[int, int]
    allocated: tuple[int, int] | None

    @property
    def saving(self) -> float:
        """end-to-end / method, counted."""
        return self.counted[0] / self.counted[1]


def measure(recipe: Recipe, num_classes: int, images: int) -> Memory:
    """Count a recipe's plan on ``images`` images, and measure it where there is a GPU.

    Raises:
        UserError: as ``local_network``.
    """
    recipe = replace(recipe, network=replace(recipe.network, sync_bn=False))  # there is one device
    method, end_to_end = counting.peak_bytes(recipe, num_classes, images)
    if not torch.cuda.is_available():
        return Memory((end_to_end, method), None)
    return Memory((end_to_end, method), allocated(recipe, num_classes, images))


def allocated(recipe: Recipe, num_classes: int, images: int) -> tuple[int, int]:
    """Bytes that a GPU's allocator holds at the worst moment of a training step: end-to-end, and the recipe's method.

    Raises:
        UserError: as ``local_network``.
    """
    recipe = replace(recipe, network=replace(recipe.network, sync_bn=False))  # there is one device
    whole = counting.end_to_end(recipe, recipe_network(recipe, num_classes).plan)
    return _allocated(whole, num_classes, images), _allocated(recipe, num_classes, images)


def published_recipe(name: str) -> Recipe:
    """A recipe of this repository, without its data."""
    return loading.load([str(ROOT / "recipes" / f"{name}.yaml"), "data.path=unused"])


def stage_shares(recipe: Recipe) -> tuple[list[float], list[float]]:
    """Per cent of the saved activations, and of the FLOPs, that fall to each segment; the stem to the first."""
    segments = counting.plan_cost(recipe, counting.likely_classes(recipe), images=1).segments
    columns = ([s.activation_bytes for s in segments], [s.flops for s in segments])
    memory, flops = ([100 * v / sum(values) for v in values] for values in columns)
    return memory, flops


def draw_savings(rows: Sequence[tuple[str, float, float | None]]) -> Figure:
    """Bars of how many times less memory than end-to-end training each plan takes, the paper's beside ours.

    Args:
        rows: label, our saving, the paper's or ``None``.
    """
    figure = Figure(figsize=(8, 1.6 + 0.5 * len(rows)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    blue, orange = run_colors(2)
    for y, (_, ours, paper) in enumerate(rows):
        _bar(axes, y - 0.19, ours, blue, "counted here" if y == 0 else None)
        if paper is not None:
            _bar(axes, y + 0.19, paper, orange, "printed in the paper" if y == 0 else None)
    axes.axvline(1, color="0.4", linewidth=0.8)
    dress(axes, "end-to-end memory / memory of the method", "times less memory", "")
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.1)
    axes.legend(frameon=False, loc="best")
    return figure


def _bar(axes: Axes, y: float, value: float, color: str, label: str | None) -> None:
    axes.barh(y, value, 0.36, color=color, label=label)
    axes.text(value, y, f" {value:.2f}", va="center", fontsize=8)


def _allocated(recipe: Recipe, num_classes: int, images: int) -> int:
    """Peak of the second of two training steps, the first one being a warm-up, above what is there already."""
    device = torch.device("cuda", torch.cuda.current_device())
    gc.collect()  # what ran before may still hold graphs
    torch._C._cuda_clearCublasWorkspaces()  # made again, and counted, for each
    before = torch.cuda.memory_allocated(device)
    net = recipe_network(recipe, num_classes).to(device)
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9)
    size = recipe.data.image_size
    pixels = torch.randn(images * net.plan.views, 3, size, size, device=device)
    batch = Batch(pixels, torch.randint(num_classes, (images,), device=device), net.plan.views)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats(device)
        net(batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    peak = torch.cuda.max_memory_allocated(device) - before
    del net, optimizer, pixels, batch
    torch.cuda.empty_cache()
    return peak
