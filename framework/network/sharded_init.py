"""Networks that are built without ever being whole: each rank keeps its slices of the weights.

The code that builds a network runs as ever, and draws the same random numbers; what it does to large tensors is only
recorded (``recording``). Afterwards their values are computed tensor by tensor, and a slice of each is kept. So the
weights are those of a network that is built as a whole, bit by bit, for any number of ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import swap_tensors
from torch.utils.serialization import config

from framework.network.on_the_host import OnTheHost
from framework.network.recording import Recording

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Made:
    """The values of tensors that were made within ``built_in_slices``.

    Attributes:
        rank: whose slices.
        ranks: of how many.
        recording: of how the tensors were made.
    """

    rank: int
    ranks: int
    recording: Recording

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor as it would be without ``built_in_slices``, on the CPU, with memory of its own."""
        return self._values(tensor).clone(memory_format=torch.preserve_format)

    def slice_of(self, tensor: Tensor) -> Tensor:
        """Elements ``rank * n`` to ``(rank + 1) * n - 1`` of the flattened tensor, with n = ceil(numel / ranks).

        Returns:
            (n,) on the CPU, with memory of its own; zeros stand for elements behind the last one.
        """
        n = -(-tensor.numel() // self.ranks)
        own = tensor.new_zeros(n, device="cpu")
        part = self._values(tensor).reshape(-1)[self.rank * n : (self.rank + 1) * n]
        own[: len(part)] = part
        del part
        self.recording.heap.freed(tensor.nbytes)
        return own

    @torch.no_grad()
    def _values(self, tensor: Tensor) -> Tensor:
        return self.recording.values(tensor.detach())


@contextmanager
def built_in_slices(rank: int, ranks: int, large: int = 2**16) -> Iterator[Made]:
    """Within the context, large tensors are made on the device ``meta``; what is yielded has their values, after it.

    Parameters and buffers that are smaller are whole and on the CPU, and so are large ones that NumPy made. The context
    needs memory for these, and for one other tensor; a value needs it for the tensor and what that follows from, such
    as the block of which it is a copy. Files are mapped, not read: safetensors, and what ``torch.save`` has written
    since PyTorch 1.6; older ones are refused.

    Args:
        rank: whose slices.
        ranks: of how many.
        large: bytes from which on a tensor is.
    """
    recording = Recording(large)
    mapped = config.patch("load.mmap", True)  # type: ignore[attr-defined]
    with mapped, recording, OnTheHost(recording):
        yield Made(rank, ranks, recording)
    _log.info(
        "built without %.1f MiB of tensors; %.1f MiB are in files, and %.1f MiB of others were copied",
        *(count / 2**20 for count in (recording.recorded, recording.mapped, recording.kept)),
    )


def fill(net: nn.Module, made: Made) -> None:
    """Give parameters and buffers without memory all of their values, in place: the objects stay the same.

    Args:
        net: built within ``built_in_slices``.
        made: what that yielded.
    """
    for tensor in dict.fromkeys([*net.parameters(), *net.buffers()]):
        if tensor.is_meta:
            put(tensor, made.whole(tensor))


def put(tensor: Tensor, values: Tensor) -> None:
    """Let a parameter or buffer without memory have these values.

    The object stays the same: optimizers, segments and heads that have it go on with it.

    Args:
        tensor: the parameter or buffer.
        values: of any shape, on any device.
    """
    new = nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values
    for name, value in vars(tensor).items():
        setattr(new, name, value)
    swap_tensors(tensor, new)
