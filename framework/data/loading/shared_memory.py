"""How workers hand over what they made: in shared memory, of which containers may have too little."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from typing import TypeVar

from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from framework.data.loading.worker import WorkerBatch
from framework.runtime.errors import UserError

T = TypeVar("T")
PLACE = "/dev/shm"


def to_shared_memory(made: T) -> T | UserError:
    """In a worker: ``made`` with its tensors in shared memory, or why they can't be there.

    PyTorch would move them in a thread of the worker, where an error is printed and the batch is lost: whoever waits
    for it waits for ever.
    """
    if get_worker_info() is None:
        return made
    try:
        for tensor in _tensors(made):
            if tensor.numel():
                tensor.share_memory_()
    except RuntimeError as error:
        reason = str(error).rpartition(": ")[2].partition(" (")[0]
        short = reason == "Success"  # what torch 2.11 says of a file that takes fewer bytes than it was given
        return no_room(os.strerror(errno.ENOSPC) if short else reason)
    return made


def from_workers(loader: DataLoader[T]) -> Iterator[T]:
    """What a loader yields.

    Raises:
        UserError: there is no shared memory for the locks of its workers.
    """
    try:
        made = iter(loader)
    except OSError as error:
        raise no_room(os.strerror(error.errno or 0)) from error
    yield from made


def no_room(reason: str) -> UserError:
    """An error of one line for images that can't be handed over."""
    size = f", {shutil.disk_usage(PLACE).total / 2**20:.3g} MiB" if os.path.isdir(PLACE) else ""
    return UserError(
        f"workers can't hand over their images in shared memory ({PLACE}{size}: {reason}): give the container more by "
        "--shm-size, or set data.workers=0"
    )


def _tensors(made: object) -> list[Tensor]:
    if isinstance(made, WorkerBatch):
        return [made.crops, *made.params, made.samples]
    return [made] if isinstance(made, Tensor) else []
