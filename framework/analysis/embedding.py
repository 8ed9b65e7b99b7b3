"""Features of a few classes in the plane: t-SNE (LoCo's supplement), or UMAP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score

from framework.evaluation.features import network_features
from framework.evaluation.run_folder import Run
from framework.runtime.errors import UserError


class Points(NamedTuple):
    """Images of a run in the plane.

    Attributes:
        xy: (N, 2).
        label: (N,) class of each.
        silhouette: of the classes in feature space, -1 to 1: how tight and separate they are.
    """

    xy: np.ndarray
    label: np.ndarray
    silhouette: float


def embed(
    run: Run, classes: Sequence[int], per_class: int, *, perplexity: float, umap: bool, seed: int
) -> Points:
    """Pooled features of the test images of some classes, laid out in the plane from their principal components.

    Args:
        run: whose newest checkpoint is the encoder.
        classes: their numbers.
        per_class: at most so many images of each, the first ones of the split.
        perplexity: of t-SNE: about how many neighbors count.
        umap: take UMAP instead.
        seed: of the layout.

    Raises:
        UserError: a class without images, fewer images than the perplexity asks for, UMAP is not installed.
    """
    shards = run.splits.held_out
    chosen = [np.flatnonzero(shards.labels == c)[:per_class] for c in classes]
    for c, rows in zip(classes, chosen, strict=True):
        if not len(rows):
            raise UserError(
                f"class {c} has no images in {shards.folder}: its labels go up to {shards.labels.max()}"
            )
    count = sum(map(len, chosen))
    if count <= 3 * perplexity:
        raise UserError(
            f"{count} images are too few for a perplexity of {perplexity:g}: more than three times as many"
        )
    loader = run.splits.eval_loader(shards.take(np.sort(np.concatenate(chosen))))
    x, y = (t.cpu().numpy() for t in network_features(run.encoder(), loader))
    xy = (
        _umap(x, seed)
        if umap
        else TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(x)
    )
    return Points(xy, y, float(silhouette_score(x, y)) if len(classes) > 1 else float("nan"))


def draw_points(runs: dict[str, Points], names: dict[int, str], method: str) -> Figure:
    """One panel a run, one color a class."""
    columns = min(3, len(runs))
    rows = -(-len(runs) // columns)
    figure = Figure(figsize=(4.1 * columns + 1.3, 4.3 * rows), dpi=150, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    colors = _class_colors(len(names))
    for panel in panels:
        panel.set_axis_off()
    for panel, (label, points) in zip(figure.axes, runs.items(), strict=False):
        panel.set_axis_on()
        for (number, name), color in zip(names.items(), colors, strict=True):
            xy = points.xy[points.label == number]
            panel.scatter(xy[:, 0], xy[:, 1], s=12, color=color, label=name, linewidths=0)
        panel.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim")
        panel.set_title(f"{label}: silhouette {points.silhouette:.2f}", loc="left", fontsize=11)
        panel.spines[:].set_color("0.8")
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right center", frameon=False, title=method, markerscale=2)
    return figure


def _class_colors(count: int) -> list[tuple[float, ...]]:
    palette = colormaps["tab10"] if count <= 10 else colormaps["gist_rainbow"]
    return [palette(i if count <= 10 else i / count) for i in range(count)]


def _umap(x: np.ndarray, seed: int) -> np.ndarray:
    try:
        from umap import UMAP
    except ImportError as error:
        raise UserError(
            "UMAP is not installed: install stagewise[umap], or leave --umap out for t-SNE"
        ) from error
    return np.asarray(UMAP(random_state=seed, n_jobs=1).fit_transform(x))
