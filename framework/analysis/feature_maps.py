"""Where a network looks: the activation of a segment over the image (MLAAN Figure 4)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from torch import Tensor

from framework import network
from framework.config.views import Views
from framework.evaluation.features import segment_outputs
from framework.evaluation.run_folder import Run, check_comparable
from framework.network import Segment
from framework.runtime.errors import UserError


def activation_maps(
    runs: Sequence[Run], segment: str | None, samples: Sequence[int]
) -> tuple[str, Tensor, Tensor]:
    """Mean over channels of the absolute activation, for the same test images in every run.

    Args:
        runs: of one network.
        segment: a stage or block; ``None`` takes the last block of the first stage.
        samples: numbers of the images in the first run's test split.

    Returns:
        The segment's name, the images (M, 3, S, S) in 0 to 1, and the maps (runs, M, H, W).

    Raises:
        UserError: runs of different networks, no such segment or image.
    """
    check_comparable(runs)
    splits = runs[0].splits
    for sample in samples:
        if not 0 <= sample < len(splits.held_out):
            raise UserError(
                f"image {sample}: {splits.held_out.folder} has images 0 to {len(splits.held_out) - 1}"
            )
    order = np.unique(np.array(samples))
    batches = [images for _, images, _ in splits.eval_loader(splits.held_out.take(order))]
    images = torch.cat(batches)[np.searchsorted(order, samples)]
    found = []
    for run in runs:
        net = run.encoder()
        segments = _up_to(network.cut(net.backbone), network.cut(net.backbone, "block"), segment)
        found.append(segment_outputs(net, segments, images)[-1].float().abs().mean(1))
    return segments[-1].name, _unnormalized(images, runs[0].recipe.views), torch.stack(found).cpu()


def breadth(values: Tensor) -> list[list[float]]:
    """Share of every map (runs, M, H, W) that lies above half its largest value: small for narrow hot spots."""
    flat = values.flatten(2)
    return (flat > flat.amax(2, keepdim=True) / 2).double().mean(2).tolist()


def draw_maps(labels: Sequence[str], images: Tensor, values: Tensor, segment: str) -> Figure:
    """A column an image, a row a run; one color scale for all, so that runs compare."""
    rows, columns = len(labels) + 1, len(images)
    figure = Figure(figsize=(1.5 * columns + 1.6, 1.55 * rows + 0.4), dpi=150, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    side = images.shape[-1]
    extent = (-0.5, side - 0.5, side - 0.5, -0.5)
    top = float(values.quantile(0.995))
    pictures = images.permute(0, 2, 3, 1).numpy()
    for row, axes_of_row in enumerate(grid):
        for column, axes in enumerate(axes_of_row):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            axes.imshow(pictures[column], extent=extent)
            if row:
                heat = values[row - 1, column].numpy()
                drawn = axes.imshow(
                    heat,
                    extent=extent,
                    cmap="inferno",
                    vmin=0,
                    vmax=top,
                    alpha=0.7,
                    interpolation="bilinear",
                )
        axes_of_row[0].set_ylabel((["image", *labels])[row], fontsize=9)
    opaque = ScalarMappable(drawn.norm, drawn.cmap)
    bar = figure.colorbar(opaque, ax=list(grid[1:].flat), shrink=0.8)
    bar.set_label(f"mean |activation| after {segment}", fontsize=8)
    bar.outline.set_visible(False)
    return figure


def _up_to(stages: list[Segment], blocks: list[Segment], name: str | None) -> list[Segment]:
    """The segments from the images to the end of a stage or block."""
    name = name or stages[0].name
    for segments in (stages, blocks):
        names = [segment.name for segment in segments]
        if name in names:
            return segments[: names.index(name) + 1]
    known = ", ".join(segment.name for segment in [*stages, *blocks])
    raise UserError(f"--segment {name}: the network has {known}")


def _unnormalized(images: Tensor, views: Views) -> Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (views.mean, views.std))
    return (images.cpu() * std + mean).clamp(0, 1)
