"""Ranks: how they find each other, agree on errors and exchange tensors.

Without ``start`` everything here behaves as in a run of one rank.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from framework.runtime.errors import LocalError, UserError
from framework.runtime.launch import launch_variables

# Timeout of collectives. NCCL's 10 minutes are less than rank 0 may take to index shards.
PATIENCE = timedelta(hours=1)
JOINING = timedelta(minutes=10)  # for all ranks to start and find each other
SLOW = timedelta(seconds=30)  # of which this much passes in silence

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


def is_main() -> bool:
    """Whether this is rank 0, which prints and writes files."""
    return rank() == 0


def device() -> torch.device:
    """The GPU of this rank, or the CPU on a machine without one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def start() -> None:
    """Join the other ranks: NCCL between GPUs, gloo on a machine without one.

    ``LOCAL_RANK`` becomes the number of this rank's GPU among those that it sees.

    Raises:
        UserError: incomplete launch variables, more ranks than GPUs on a machine, a port that is taken, or ranks
            that don't come.
    """
    os.environ.update(launch_variables(os.environ))
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        _join()
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise LocalError.as_transient(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} can't meet the others at {address}:{port} "
            f"({str(error).splitlines()[0]}); all must be started, and if another run has that port, choose one with "
            "--master_port or MASTER_PORT"
        ) from error


def _join() -> None:
    with _told_if_slow():
        store, rank, ranks = next(dist.rendezvous("env://", timeout=JOINING))
        store.set_timeout(JOINING)
        gpus = torch.cuda.is_available()
        if gpus:
            os.environ["LOCAL_RANK"] = str(_own_gpu(store, rank, ranks))
            torch.cuda.set_device(device())
        else:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # spares DeepSpeed a search and its warning
        dist.init_process_group(
            "nccl" if gpus else "gloo",
            store=dist.PrefixStore("training", store),
            rank=rank,
            world_size=ranks,
            device_id=device() if gpus else None,
            timeout=PATIENCE,
        )
        store.set_timeout(PATIENCE)


@contextmanager
def _told_if_slow() -> Iterator[None]:
    """Say who waits for whom where ranks take long to come."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    rank, ranks, address, port = (os.environ[name] for name in names)
    words = (
        f"rank {rank} on {socket.gethostname()} still waits for all {ranks} ranks to meet at {address}:{port}; "
        f"after {JOINING.total_seconds():g} s it gives up"
    )
    timer = threading.Timer(SLOW.total_seconds(), lambda: print(words, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _own_gpu(store: dist.Store, rank: int, ranks: int) -> int:
    """Number of this rank's GPU among those that it sees; every rank publishes what it sees, so all fail alike."""
    uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    store.set(f"gpus/{rank}", json.dumps([socket.gethostname(), int(os.environ["LOCAL_RANK"]), uuids]))
    return choose_gpus([json.loads(seen) for seen in store.multi_get([f"gpus/{r}" for r in range(ranks)])])[
        rank
    ]


def choose_gpus(seen: Sequence[tuple[str, int, Sequence[str]]]) -> list[int]:
    """For every rank, which of the GPUs that it sees it takes.

    Ranks of a machine may all see all of its GPUs, or each its own (Slurm's ``--gpus-per-task``).

    Args:
        seen: host, local rank and the unique names of the visible GPUs, by rank.

    Raises:
        UserError: two ranks would have the same GPU.
    """
    chosen = [local % len(gpus) for _, local, gpus in seen]
    owners: dict[str, int] = {}
    for rank, ((host, _, gpus), number) in enumerate(zip(seen, chosen, strict=True)):
        other = owners.setdefault(gpus[number], rank)
        if other != rank:
            raise UserError(
                f"ranks {other} and {rank} on {host} would share a GPU, of which it shows them {len(gpus)}: start one "
                "process a GPU (deepspeed --num_gpus, torchrun --nproc_per_node, srun --ntasks-per-node with as many "
                "--gpus-per-node, or --gpus-per-task=1)"
            )
    return chosen


def stop() -> None:
    """Leave when all ranks are here: srun ends those that are late, which may still be writing."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


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


def broadcast_weights(net: nn.Module) -> None:
    """Overwrite every parameter and buffer with rank 0's."""
    if world_size() == 1:
        return
    for tensor in [*net.parameters(), *net.buffers()]:
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


def any_over_ranks(flags: Tensor) -> Tensor:
    """Element by element, whether any rank has ``True``; does not wait for the device."""
    if world_size() == 1:
        return flags
    seen = flags.float()
    dist.all_reduce(seen, op=dist.ReduceOp.MAX)
    return seen > 0


def max_over_ranks(number: int) -> Callable[[], int]:
    """Start to find the largest of the ranks' whole numbers; the function returned waits for it."""
    if world_size() == 1:
        return lambda: number
    largest = torch.tensor(number, device=device())
    work = dist.all_reduce(largest, op=dist.ReduceOp.MAX, async_op=True)

    def answer() -> int:
        work.wait()
        return int(largest)

    return answer


def sum_over_ranks(number: int) -> int:
    """Sum of a whole number over the ranks."""
    return round(
        float(mean_over_ranks(torch.tensor(number, dtype=torch.float64, device=device()))) * world_size()
    )


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
