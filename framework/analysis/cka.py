"""How alike two networks are: minibatch linear CKA of their segments (Nguyen et al. 2021; MLAAN Figure 6)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from framework.analysis.pictures import dress, run_colors, segment_ticks
from framework.evaluation.features import segment_outputs
from framework.evaluation.run_folder import Run, check_comparable
from framework.runtime.errors import UserError

FEWEST = 4  # images of a batch: the unbiased estimator divides by n - 3
_COLUMNS = 2**16  # of float64 activations at a time


class MinibatchCKA:
    """Linear CKA of A against B layers, from the unbiased HSIC (Song et al. 2012, Eq. 5) summed over batches.

    Unlike the biased estimate, its mean does not depend on the batch size.
    """

    def __init__(self) -> None:
        self._cross: Tensor | float = 0.0
        self._own_a: Tensor | float = 0.0
        self._own_b: Tensor | float = 0.0
        self.batches = 0

    def add(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
        """A batch of at least ``FEWEST`` images: A and B activations (N, ...), flattened; computed in float64."""
        k, m = (torch.stack([_gram(x.flatten(1)) for x in layers]) for layers in (a, b))
        self._cross = self._cross + _hsic(k, m)
        self._own_a = self._own_a + _hsic(k, k).diagonal()
        self._own_b = self._own_b + _hsic(m, m).diagonal()
        self.batches += 1

    def matrix(self) -> Tensor:
        """(A, B) float64; NaN for a layer that is constant.

        Raises:
            UserError: no batch was added.
        """
        if not self.batches:
            raise UserError(f"CKA needs at least {FEWEST} images in a batch")
        assert isinstance(self._own_a, Tensor) and isinstance(self._own_b, Tensor)
        return self._cross / (self._own_a[:, None] * self._own_b).sqrt()


def run_cka(a: Run, b: Run, images: int | None = None) -> Tensor:
    """CKA of every segment of ``a`` (rows) against every one of ``b``, on the test images of ``a``.

    Both are cut where ``a`` is.

    Args:
        a: a run.
        b: another of the same network.
        images: at most so many, evenly spaced.

    Raises:
        UserError: the runs can't be compared, a checkpoint is missing, too few images.
    """
    check_comparable([a, b])
    net_a, net_b = a.encoder(), b.encoder()
    cut_a, cut_b = a.segments(net_a), a.segments(net_b)
    shards = a.splits.held_out.subsample(images)
    if len(shards) < FEWEST:
        raise UserError(f"{shards.folder}: CKA needs at least {FEWEST} images, and has {len(shards)}")
    cka = MinibatchCKA()
    for _, batch, _ in a.splits.eval_loader(shards):
        if len(batch) >= FEWEST:
            cka.add(segment_outputs(net_a, cut_a, batch), segment_outputs(net_b, cut_b, batch))
    return cka.matrix()


def draw_cka(segments: list[str], reference: str, matrices: dict[str, Tensor]) -> Figure:
    """Same segment against same segment as lines, one a run; below it each run's whole matrix."""
    columns = len(matrices)
    figure = Figure(figsize=(max(7.0, 3.9 * columns), 7.2), dpi=150, layout="constrained")
    lines, matrices_row = figure.subfigures(2, 1, height_ratios=(1, 1.15), squeeze=False).flat
    axes = lines.add_subplot()
    for (label, matrix), color in zip(matrices.items(), run_colors(columns), strict=True):
        same = matrix.diagonal()
        mean = f"{label} (mean {same.nanmean():.2f})"
        axes.plot(
            range(len(segments)), same.tolist(), color=color, marker="o", ms=4, linewidth=1.8, label=mean
        )
    dress(axes, f"similarity to {reference}, segment by segment", "segment", "linear CKA")
    segment_ticks(axes, segments)
    axes.set_ylim(min(0.0, *(float(m.nan_to_num().min()) for m in matrices.values())), 1.03)
    axes.margins(x=0.04)
    axes.legend(frameon=False, loc="best")
    panels = matrices_row.subplots(1, columns, squeeze=False)[0]
    for panel, (label, matrix) in zip(panels, matrices.items(), strict=True):
        image = _draw_matrix(panel, matrix, segments, label, reference)
    matrices_row.colorbar(image, ax=list(panels), shrink=0.85, label="linear CKA")
    return figure


def _draw_matrix(axes: Axes, matrix: Tensor, segments: list[str], label: str, reference: str) -> AxesImage:
    image = axes.imshow(matrix.cpu().numpy(), vmin=0, vmax=1, cmap="magma", origin="lower")
    every = max(1, -(-len(segments) // 10))
    ticks = range(0, len(segments), every)
    names = [segments[i] for i in ticks]
    axes.set_xticks(ticks, names, rotation=45 if len(names) > 5 else 0)
    axes.set_yticks(ticks, names)
    axes.set(xlabel=reference, ylabel=label)
    if len(segments) <= 6:
        for (row, column), value in zip(
            ((r, c) for r in range(len(segments)) for c in range(len(segments))),
            matrix.flatten().tolist(),
            strict=True,
        ):
            axes.text(
                column, row, f"{value:.2f}", ha="center", va="center", color="w" if value < 0.6 else "k"
            )
    return image


def _gram(x: Tensor) -> Tensor:
    """Inner products (N, N) of the rows of ``x`` (N, P) in float64, without the diagonal."""
    gram = x.new_zeros(len(x), len(x), dtype=torch.float64)
    for part in x.split(_COLUMNS, dim=1):
        part = part.double()
        gram += part @ part.T
    return gram.fill_diagonal_(0)


def _hsic(k: Tensor, m: Tensor) -> Tensor:
    """(A, B) unbiased HSIC of gram matrices (A, N, N) and (B, N, N) with zero diagonals."""
    n = k.shape[1]
    trace = k.flatten(1) @ m.flatten(1).T
    rows_k, rows_m = k.sum(2), m.sum(2)
    product = rows_k.sum(1)[:, None] * rows_m.sum(1) / ((n - 1) * (n - 2))
    return (trace + product - 2 / (n - 2) * rows_k @ rows_m.T) / (n * (n - 3))
