"""Gradients that are averaged over ranks into slices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from framework.engines.host_copy import Pending
from framework.engines.slices import ShardRanks, Slices


class SliceGradients:
    """Gradients of the first tensors of ``Slices``, whole until they are summed over the ranks, as slices.

    Args:
        slices: theirs.
        parameters: the first of its tensors.
        ranks: as in ``Slices``.
        reduced: type in which they are summed; ``None`` for their own.

    Attributes:
        due: whether all gradients of a step are on their way, or here.
    """

    def __init__(
        self,
        slices: Slices,
        parameters: Sequence[nn.Parameter],
        ranks: ShardRanks,
        reduced: torch.dtype | None = None,
    ) -> None:
        self._slices, self._parameters, self._ranks = slices, parameters, ranks
        self._reduced = reduced or slices.flat.dtype
        self._device = slices.place
        self._width = sum(slices.widths[p] for p in parameters)
        self._missing = len(parameters)
        self._whole: Tensor | None = None  # (ranks, width)
        self._sum: Tensor | None = None  # (width,), which is being summed
        self._pending: Pending | None = None
        self._averaged: Tensor | None = None
        self.due = False

    def add(self, gradients: Mapping[nn.Parameter, Tensor], factor: float) -> bool:
        """Take in gradients of a micro-batch, times a factor; whether all of them are here now."""
        if self._whole is None:
            kind = self._slices.flat.dtype
            self._whole = torch.zeros(self._ranks.size, self._width, dtype=kind, device=self._device)
        for parameter, gradient in gradients.items():
            self._add(self._whole, parameter, gradient.reshape(-1), factor)
        self._missing = (self._missing or len(self._parameters)) - len(gradients)
        return not self._missing

    def _add(self, whole: Tensor, parameter: nn.Parameter, gradient: Tensor, factor: float) -> None:
        place, width = self._slices.places[parameter], self._slices.widths[parameter]
        rows = whole.narrow(1, place, width)
        full = gradient.numel() // width
        rows[:full].add_(gradient[: full * width].view(full, width), alpha=factor)
        if rest := gradient.numel() - full * width:
            rows[full, :rest].add_(gradient[full * width :], alpha=factor)

    def start(self, last: bool) -> None:
        """Begin to average what there is over the ranks; collective.

        Args:
            last: whether nothing will be added in this step.
        """
        self.collect()
        assert self._whole is not None
        whole = self._whole.mul_(1 / self._ranks.ranks).to(self._reduced).view(-1)
        self._whole = whole  # until it is sent
        self._sum = whole.new_empty(self._width)
        self._pending = self._ranks.sum_slice(self._sum, whole)
        self.due = last

    def collect(self) -> None:
        """Wait for what ``start`` began, and free what was whole; then replicas average their slices."""
        if self._sum is None:
            return
        if self._pending is not None:
            self._pending.wait()
        part, self._sum, self._whole = self._sum, None, None
        part = part.to(self._slices.flat.dtype)
        self._averaged = part if self._averaged is None else self._averaged.add_(part)
        self._pending = self._ranks.sum_copies(self._averaged) if self.due else None

    def finish(self) -> Tensor:
        """This rank's slices (width,) of the averaged gradients."""
        self.collect()
        if self._pending is not None:
            self._pending.wait()
        assert self._averaged is not None
        averaged, self._averaged, self._pending, self.due = self._averaged, None, None, False
        return averaged.to(self._slices.flat.device)
