"""Numbers on their way from the device to the host, which nobody waits for until they are read."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Pending(Protocol):
    """An operation that has been started, such as a collective's ``Work``."""

    def wait(self) -> object:
        """Return when it is complete."""


class _Copy:
    """``Pending``: waits for a copy, not until the device is idle."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event()
        self._event.record()

    def wait(self) -> None:
        """Return when the copy is complete."""
        self._event.synchronize()


def copied_to_host(x: Tensor, pending: Pending | None = None) -> tuple[Tensor, Pending | None]:
    """A tensor in the host's memory, and what must complete before it is read.

    The copy goes on a stream of its own, so that the step's kernels don't wait for it either.

    Args:
        x: on any device; the device must not write to it before the copy is made, unless in the order of its stream.
        pending: must complete before ``x`` is read.
    """
    if not x.is_cuda:
        return x, pending
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    aside = torch.cuda.Stream(x.device)
    aside.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(aside):
        if pending is not None:
            pending.wait()  # the stream does, not the host
        host.copy_(x, non_blocking=True)
        x.record_stream(aside)
        return host, _Copy()
