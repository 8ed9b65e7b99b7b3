"""How much of the labels every segment has made linear (MLAAN Figure 5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from framework.analysis.pictures import dress, run_colors, segment_ticks
from framework.data.shards.index import ShardSet
from framework.evaluation.features import extract, segment_outputs
from framework.evaluation.linear_probe import linear_top1
from framework.evaluation.run_folder import Run
from framework.execution import LocalNetwork
from framework.network import Segment


def probe_layers(
    run: Run, cut_like: Run, *, images: int | None, flatten: bool, on_segment: Callable[[], None]
) -> dict[str, float]:
    """Test accuracy in per cent of a linear probe on every segment's frozen output.

    Args:
        run: whose newest checkpoint is probed, on its own images without augmentation.
        cut_like: the run whose cut makes the segments.
        images: at most so many of each split, evenly spaced.
        flatten: probe the whole map instead of its average over positions.
        on_segment: called after every probe.

    Raises:
        UserError: no checkpoint, no labels, a single class, features that are not finite.
    """
    net = run.encoder()
    segments = cut_like.segments(net)
    (train, train_y), (test, test_y) = (
        _outputs(run, net, segments, shards.subsample(images), flatten)
        for shards in (run.splits.train, run.splits.held_out)
    )
    top1 = {}
    for segment, train_x, test_x in zip(segments, train, test, strict=True):
        top1[segment.name] = linear_top1(train_x, train_y, test_x, test_y)
        on_segment()
    return top1


def draw_layers(top1: dict[str, dict[str, float]]) -> Figure:
    """Accuracy over segments, a line for every run."""
    figure = Figure(figsize=(7.5, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for (label, of_run), color in zip(top1.items(), run_colors(len(top1)), strict=True):
        axes.plot(
            range(len(of_run)),
            list(of_run.values()),
            color=color,
            marker="o",
            ms=4,
            linewidth=1.8,
            label=label,
        )
    dress(axes, "linear probe on every segment", "segment", "test top-1 in %")
    segment_ticks(axes, list(next(iter(top1.values()))))
    axes.margins(x=0.04)
    axes.legend(frameon=False)
    return figure


def _outputs(
    run: Run, net: LocalNetwork, segments: Sequence[Segment], shards: ShardSet, flatten: bool
) -> tuple[Sequence[Tensor], Tensor]:
    """Of every segment (N, C), and the labels (N,); on the CPU, where the probes are fitted."""
    widths: list[int] = []

    def encode(images: Tensor) -> Tensor:
        outputs = segment_outputs(net, segments, images)
        rows = [x.flatten(1).float() if flatten else x.float().mean((2, 3)) for x in outputs]
        widths[:] = [x.shape[1] for x in rows]
        return torch.cat(rows, dim=1).cpu()

    _, rows, labels = extract(encode, run.splits.eval_loader(shards))
    return rows.split(widths, dim=1), labels.cpu()
