"""Work for the next batch while the device computes on this one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def finished(
    drawn: Iterable[T], finish: Callable[[T], Tensor], device: torch.device
) -> Iterator[tuple[T, Tensor]]:
    """Every item with its ``finish``.

    On a GPU the copies and kernels for the next item run on a stream of their own, beside those of whatever
    the caller does with this one; elsewhere there is nothing to overlap.
    """
    if device.type != "cuda":
        for item in drawn:
            yield item, finish(item)
        return
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    ready: tuple[T, Tensor, torch.cuda.Event] | None = None
    for item in drawn:
        with torch.cuda.stream(side):
            following = item, finish(item), side.record_event()
        if ready is not None:
            yield _handed_over(*ready, device)
        ready = following
    if ready is not None:
        yield _handed_over(*ready, device)


def _handed_over(item: T, images: Tensor, done: torch.cuda.Event, device: torch.device) -> tuple[T, Tensor]:
    """The images for use on the current stream."""
    current = torch.cuda.current_stream(device)
    current.wait_event(done)
    images.record_stream(current)  # else their memory could be given to the side stream while in use
    return item, images
