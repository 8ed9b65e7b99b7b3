"""Bytes of the tensors that autograd saves: the same on any machine, unlike the peak of an allocator."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class LiveActivations:
    """Inside ``with``, counts every tensor that autograd saves, for as long as a graph refers to it.

    Tensors that share storage count once; weights and buffers don't count.

    Args:
        ignore: tensors that are alive anyway: parameters, buffers, the images.

    Attributes:
        now: bytes saved at this moment.
        peak: largest ``now`` so far.
    """

    def __init__(self, ignore: Iterable[Tensor] = ()) -> None:
        self.now = self.peak = 0
        self._ignore = {_storage(t) for t in ignore}
        self._holders: dict[int, int] = {}
        self._hooks: Any = None

    def __enter__(self) -> LiveActivations:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: _Saved(t, self), lambda s: s.tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def hold(self, tensor: Tensor) -> None:
        """One more graph node has saved this tensor."""
        key = _storage(tensor)
        if key in self._ignore:
            return
        self._holders[key] = self._holders.get(key, 0) + 1
        if self._holders[key] == 1:
            self.now += tensor.untyped_storage().nbytes()
            self.peak = max(self.peak, self.now)

    def release(self, tensor: Tensor) -> None:
        """A graph node that had saved this tensor was freed."""
        key = _storage(tensor)
        if key in self._ignore:
            return
        self._holders[key] -= 1
        if self._holders[key] == 0:
            del self._holders[key]
            self.now -= tensor.untyped_storage().nbytes()


class _Saved:
    """What a graph node refers to in place of the tensor; freed with the node."""

    def __init__(self, tensor: Tensor, count: LiveActivations) -> None:
        self.tensor, self._count = tensor, count
        count.hold(tensor)

    def __del__(self) -> None:
        self._count.release(self.tensor)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # tells fake tensors apart too, whose address is always 0
