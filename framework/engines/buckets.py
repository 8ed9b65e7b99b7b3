"""Gradients that travel together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

# Bytes of a bucket, and of the first one, in PyTorch's DistributedDataParallel.
LARGEST, SMALLEST = 25 * 2**20, 2**20


class Bucket:
    """The gradients of some parameters in one flat tensor, which stays where it is.

    Args:
        parameters: of one type, on one device.
        size: numbers in the tensor, of which the last may belong to no gradient; as many as there are if ``None``.

    Attributes:
        flat: their gradients, one after the other.
        views: the same by parameter, each of its parameter's shape.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], size: int | None = None) -> None:
        like, used = parameters[0], sum(p.numel() for p in parameters)
        self.flat = torch.zeros(size or used, dtype=like.dtype, device=like.device)
        pieces = self.flat[:used].split([p.numel() for p in parameters])
        self.views = {p: piece.view_as(p) for p, piece in zip(parameters, pieces, strict=True)}
        self._missing = len(self.views)

    def add(self, gradients: Mapping[nn.Parameter, Tensor], factor: float, first: bool) -> bool:
        """Take in gradients of a micro-batch, times a factor; whether all of its gradients are here now.

        Args:
            gradients: some of those of the bucket, each once a micro-batch.
            factor: the same in all micro-batches.
            first: whether the micro-batch is the first one of its step.
        """
        views, values = [self.views[p] for p in gradients], list(gradients.values())
        scaled = torch._foreach_mul(values, factor) if factor != 1 else values
        if first:
            torch._foreach_copy_(views, scaled)
        else:
            torch._foreach_add_(views, scaled)
        self._missing = (self._missing or len(self.views)) - len(views)
        return not self._missing


def filled(order: Sequence[Sequence[nn.Parameter]]) -> list[list[nn.Parameter]]:
    """Buckets filled in this order. They hold a sixteenth of all bytes, but no group of parameters is divided.

    Large buckets wait for their last gradient and for their first use, small ones pay for each exchange.
    """
    size = min(LARGEST, max(SMALLEST, sum(map(_bytes, order)) // 16))
    return list(_filled(order, size))


def _filled(order: Sequence[Sequence[nn.Parameter]], size: int) -> Iterator[list[nn.Parameter]]:
    filling: list[nn.Parameter] = []
    for group in order:
        for kind in dict.fromkeys((p.dtype, p.device) for p in group):
            alike = [p for p in group if (p.dtype, p.device) == kind]
            fits = _bytes(filling) + _bytes(alike) <= size
            if filling and not (fits and kind == (filling[0].dtype, filling[0].device)):
                yield filling
                filling = []
            filling = [*filling, *alike]
    if filling:
        yield filling


def _bytes(parameters: Sequence[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)
