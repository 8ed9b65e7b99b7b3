"""Point-to-point messages between pipeline stages: tensors in a fixed order on one-way channels."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from framework.runtime import distributed
from framework.runtime.errors import DeadRank

_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)
_DIMENSIONS = 8


@dataclass
class Peer:
    """The rank at the other end, and its name in error messages."""

    rank: int
    name: str


class Sender:
    """The sending end of a channel. ``send`` returns at once, unless ``ahead`` messages have not been received yet.

    Args:
        group: the ranks; one for each direction, because a backend sends the messages of a group in order.
        peer: the receiver.
        timeout: seconds to wait for it.
        ahead: largest number of messages not yet received; ``None`` for no limit but the schedule's.
    """

    def __init__(
        self, group: dist.ProcessGroup, peer: Peer, timeout: float, ahead: int | None = None
    ) -> None:
        self._group, self._peer, self._timeout, self._ahead = group, peer, timeout, ahead
        self._in_flight: deque[list[tuple[dist.Work, Tensor]]] = deque()
        self._formats: list[torch.memory_format] | None = None

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Send tensors, which must not change afterwards; shapes and types are those of the first message.

        Raises:
            DeadRank: the peer has received nothing for too long.
        """
        parts = []
        if self._formats is None:
            self._formats = [_format(tensor) for tensor in tensors]
            parts.append(_description(tensors))
        pairs = zip(tensors, self._formats, strict=True)
        parts += [_dense(tensor.contiguous(memory_format=order)) for tensor, order in pairs]
        if self._ahead is not None and len(self._in_flight) >= self._ahead:
            self._finish(self._in_flight.popleft())
        while self._in_flight and all(work.is_completed() for work, _ in self._in_flight[0]):
            self._finish(self._in_flight.popleft())
        with _Named(self._peer, self._timeout, "takes no messages any more"):
            self._in_flight.append([(self._post(part), part) for part in parts])

    def flush(self) -> None:
        """Wait until all messages have been received."""
        while self._in_flight:
            self._finish(self._in_flight.popleft())

    def _post(self, part: Tensor) -> dist.Work:
        work = dist.isend(part, self._peer.rank, group=self._group)
        assert work is not None
        return work

    def _finish(self, message: list[tuple[dist.Work, Tensor]]) -> None:
        with _Named(self._peer, self._timeout, "does not take what was sent to it"):
            for work, part in message:
                _await(work, part, self._timeout)


class Receiver:
    """The receiving end of a channel."""

    def __init__(self, group: dist.ProcessGroup, peer: Peer, timeout: float) -> None:
        self._group, self._peer, self._timeout = group, peer, timeout
        self._like: list[Tensor] | None = None

    def receive(self) -> list[Tensor]:
        """The next message; waits for it.

        Raises:
            DeadRank: the peer has sent nothing for too long.
            RuntimeError: the connection is closed.
        """
        if self._like is None:
            description = torch.empty(
                1 + _DIMENSIONS, _DIMENSIONS, dtype=torch.int64, device=distributed.device()
            )
            self._fill(description)
            self._like = _described(description)
        return [self._fill(torch.empty_like(like, device=distributed.device())) for like in self._like]

    def _fill(self, tensor: Tensor) -> Tensor:
        with _Named(self._peer, self._timeout, "has sent nothing"):
            work = dist.irecv(_dense(tensor), self._peer.rank, group=self._group)
            assert work is not None
            _await(work, tensor, self._timeout)
        return tensor


def _await(work: dist.Work, tensor: Tensor, timeout: float) -> None:
    """Wait for a message. On a GPU its stream waits: with a time-out given, NCCL would block the host.

    There the group's own time-out ends a process whose peer is silent.
    """
    if tensor.is_cuda:
        work.wait()
    else:
        work.wait(timedelta(seconds=timeout))


class _Named:
    """Turns a time-out into a line that names the rank at the other end."""

    def __init__(self, peer: Peer, timeout: float, silence: str) -> None:
        self._peer, self._timeout, self._silence = peer, timeout, silence

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError) and "imed out" in str(error):
            raise DeadRank(
                f"rank {dist.get_rank()}: {self._peer.name} {self._silence} for {self._timeout:g} s "
                "(pipeline.timeout); the same command goes on from the last checkpoint"
            ) from error


def _format(tensor: Tensor) -> torch.memory_format:
    last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _dense(tensor: Tensor) -> Tensor:
    """A contiguous view, which backends ask for, of a tensor in either order."""
    return tensor.permute(0, 2, 3, 1) if _format(tensor) is torch.channels_last else tensor


def _description(tensors: Sequence[Tensor]) -> Tensor:
    """(9, 8) int64: number of tensors, then for each its type, channels-last or not, dimensions and shape."""
    rows = [[len(tensors)]]
    for tensor in tensors:
        last = _format(tensor) is torch.channels_last
        rows.append([_TYPES.index(tensor.dtype), int(last), tensor.ndim, *tensor.shape])
    rows += [[]] * (1 + _DIMENSIONS - len(rows))
    padded = [row + [0] * (_DIMENSIONS - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.int64, device=distributed.device())


def _described(description: Tensor) -> list[Tensor]:
    (count, *_), *rows = description.tolist()
    found = []
    for kind, last, dimensions, *shape in rows[:count]:
        layout = torch.channels_last if last else torch.contiguous_format
        found.append(
            torch.empty(shape[:dimensions], dtype=_TYPES[kind], device="meta").to(memory_format=layout)
        )
    return found
