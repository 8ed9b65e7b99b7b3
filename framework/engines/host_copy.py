"""Numbers on their way from the device to the host, which nobody waits for until they are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class Pending(Protocol):
    """An operation that has been started, such as a collective's ``Work``."""

    def wait(self) -> object:
        """Return when it is complete."""


class Complete:
    """``Pending``: there was nothing to do."""

    def wait(self) -> None:
        """Return."""


class _Copy:
    """``Pending``: waits for a copy, not until the device is idle."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event()
        self._event.record()

    def wait(self) -> None:
        """Return when the copy is complete."""
        self._event.synchronize()


def read_later(x: Tensor, pending: Pending | None = None) -> Callable[[], Any]:
    """Start to copy a tensor to the host.

    The copy goes on a stream of its own, so that the step's kernels don't wait for it either.

    Args:
        x: on any device; nothing must write to it any more.
        pending: must complete before ``x`` is read.

    Returns:
        A function that waits for the copy, and gives the numbers as ``x.tolist()`` would.
    """
    host, complete = _copied_to_host(x, pending)

    def numbers() -> Any:
        if complete is not None:
            complete.wait()
        return host.tolist()

    return numbers


def _copied_to_host(x: Tensor, pending: Pending | None) -> tuple[Tensor, Pending | None]:
    """A tensor in the host's memory, and what must complete before it is read."""
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
