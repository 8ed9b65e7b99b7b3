"""Ranks: how they agree on errors and exchange tensors.

Before ``joining.start`` everything here behaves as in a run of one rank.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from framework.runtime.errors import LocalError, UserError

Group = dist.ProcessGroup | Literal["alone"] | None
_REPLICAS: ContextVar[Group] = ContextVar("replicas", default=None)


@contextmanager
def replicas(group: Group) -> Iterator[None]:
    """Inside, the functions here see the ranks of ``group`` only, or this process "alone"; so do heads and norms."""
    token = _REPLICAS.set(group)
    try:
        yield
    finally:
        _REPLICAS.reset(token)


def rank() -> int:
    """Number of this process, 0 to ``world_size() - 1``."""
    group = _REPLICAS.get()
    return dist.get_rank(group) if dist.is_initialized() and group != "alone" else 0


def world_size() -> int:
    """Number of processes."""
    group = _REPLICAS.get()
    return dist.get_world_size(group) if dist.is_initialized() and group != "alone" else 1


def group() -> dist.ProcessGroup | None:
    """The processes, of which there are several; ``None`` stands for all."""
    seen = _REPLICAS.get()
    assert seen != "alone"
    return seen


def is_main() -> bool:
    """Whether this is rank 0, which prints and writes files."""
    return rank() == 0


def device() -> torch.device:
    """The GPU of this rank, or the CPU on a machine without one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def same_outcome() -> Iterator[None]:
    """An exception on any rank inside the block becomes a ``UserError`` on every rank.

    The message is the same everywhere, so that rank 0 alone can print it; where ranks differ it has one
    line per distinct message and names the ranks. An exception other than UserError is raised again, with
    its traceback, where it happened. The block must not communicate: a rank that has left it does not answer.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if isinstance(failure, UserError):
        message = str(failure)
    else:
        message = f"{type(failure).__name__}: {failure}" if failure else ""
    messages = gather_text(message)
    if failure is not None and not isinstance(failure, UserError):
        raise failure
    if any(messages):
        raise UserError(_summary(messages)) from failure


@contextmanager
def own_errors() -> Iterator[None]:
    """Inside, a ``UserError`` becomes a ``LocalError`` with this rank's number: other ranks may have no error."""
    try:
        yield
    except UserError as error:
        where = f"rank {rank()}: " if world_size() > 1 else ""
        raise LocalError(f"{where}{error}") from error


def _summary(messages: list[str]) -> str:
    ranks: dict[str, list[str]] = {}
    for number, message in enumerate(messages):
        ranks.setdefault(message, []).append(str(number))
    if len(ranks) == 1:
        return messages[0]
    return "\n".join(f"rank {','.join(where)}: {message}" for message, where in ranks.items() if message)


def gather_text(text: str) -> list[str]:
    """Every rank's text, in rank order, on every rank."""
    if world_size() == 1:
        return [text]
    texts: list[Any] = [None] * world_size()
    dist.all_gather_object(texts, text)
    return texts


def gather_tensors(mine: dict[str, Tensor]) -> dict[str, Tensor]:
    """On rank 0's CPU: the tensors of all ranks, whose names must differ. Elsewhere: none. Collective."""
    kinds = [[name, list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in mine.items()]
    listed = gather_text(json.dumps(kinds))
    if not is_main():
        for tensor in mine.values():
            dist.send(tensor.detach().to(device()).contiguous(), 0)
        return {}
    gathered = {name: tensor.detach().cpu().clone() for name, tensor in mine.items()}
    for source, text in enumerate(listed[1:], start=1):
        for name, shape, kind in json.loads(text):
            tensor = torch.empty(shape, dtype=getattr(torch, kind), device=device())
            dist.recv(tensor, source)
            gathered[name] = tensor.cpu()
    return gathered


def from_main(value: Any) -> Any:
    """Rank 0's ``value`` (anything that JSON can hold) on every rank."""
    return json.loads(gather_text(json.dumps(value) if is_main() else "")[0])


def broadcast_weights(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with rank 0's."""
    if world_size() == 1:
        return
    for tensor in tensors:
        whole = tensor.detach().contiguous()
        dist.broadcast(whole, src=0)
        tensor.data.copy_(whole)


def mean_over_ranks(x: Tensor) -> Tensor:
    """Average of ``x`` over the ranks (not differentiable)."""
    if world_size() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / world_size()


def start_sum_over_ranks(x: Tensor) -> tuple[Tensor, dist.Work | None]:
    """The sum of ``x`` over the ranks, which is there when the operation beside it is complete."""
    total = x.detach().clone()
    return total, dist.all_reduce(total, async_op=True) if world_size() > 1 else None


def start_max_over_ranks(x: Tensor) -> tuple[Tensor, dist.Work | None]:
    """Likewise the largest of every element."""
    largest = x.detach().clone()
    work = dist.all_reduce(largest, op=dist.ReduceOp.MAX, async_op=True) if world_size() > 1 else None
    return largest, work


def from_first(x: Tensor) -> Tensor:
    """The first rank's ``x``, on every rank; of all ranks it must have one shape."""
    if world_size() > 1:
        dist.broadcast(x, group=group(), group_src=0)
    return x


def any_over_ranks(flags: Tensor) -> Tensor:
    """Element by element, whether any rank has ``True``; does not wait for the device."""
    if world_size() == 1:
        return flags
    seen = flags.float()
    dist.all_reduce(seen, op=dist.ReduceOp.MAX)
    return seen > 0


def new_group(**options: Any) -> dist.ProcessGroup:
    """A process group of all ranks; ``options`` are those of ``torch.distributed.new_group``."""
    group = dist.new_group(**options)
    if not isinstance(group, dist.ProcessGroup):  # -100 stands for "this rank is no member"
        raise RuntimeError("a group of all ranks has this rank")
    return group


def sum_over_ranks(number: int) -> int:
    """Sum of a whole number over the ranks."""
    return round(total_over_ranks(number))


def total_over_ranks(number: float) -> float:
    """Sum of a number over the ranks."""
    total = torch.tensor(number, dtype=torch.float64, device=device())
    if world_size() > 1:
        dist.all_reduce(total)
    return float(total)


def gather_with_gradient(x: Tensor) -> Tensor:
    """Concatenate (n, ...) tensors of all ranks along dim 0, in rank order, to (world * n, ...).

    Differentiable: every rank's loss depends on every rank's rows, so the gradient of the own rows is the sum
    over ranks of what each sends back to them. All ranks must call it, and run its backward, in the same order.
    """
    return x if world_size() == 1 else _Gather.apply(x)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.group = _REPLICAS.get()  # backward may run in another thread, which has another context
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous(), group=ctx.group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)]
