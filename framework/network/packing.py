"""Two tensors that pass between blocks, as one: packed where a segment ends, unpacked where the next begins.

So everything outside (gradient boundaries, buffers, the wire between pipeline stages) has one tensor. Packing copies
both once a boundary; gradients are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from framework.network.layouts import ToMap
from framework.network.values import BATCH


def of_one_image(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of what the recorded batch's tensor holds for one image."""
    return shape[0] // BATCH, *shape[1:]


def columns(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """First column of each of the recorded batch's tensors, and the number of all columns."""
    return [0, *accumulate(prod(of_one_image(shape)) for shape in shapes)]


def pack(tensors: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """Tensors (N * rows, ...) -> (N, D), with all that they hold for an image in a row."""
    return torch.cat([x.reshape(len(x) // n, -1) for x, n in zip(tensors, rows, strict=True)], 1)


def unpack(packed: Tensor, begin: int, shape: tuple[int, ...]) -> Tensor:
    """One of the tensors, which begins at a column and has this shape for one image: (N, D) -> (N * rows, ...)."""
    rows, *sizes = shape
    return packed[:, begin : begin + rows * prod(sizes)].reshape(len(packed) * rows, *sizes)


def from_packed(packed: Tensor, begin: int, shape: tuple[int, ...], to_map: ToMap) -> Tensor:
    """(N, D) -> (N, C, H, W), by one of the tensors."""
    return to_map(unpack(packed, begin, shape))
