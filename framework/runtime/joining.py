"""How ranks find each other, which GPU each takes, and how they leave."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from framework.runtime.dead_ranks import dead_ranks_named
from framework.runtime.distributed import device
from framework.runtime.errors import LocalError, UserError
from framework.runtime.launch import launch_variables
from framework.runtime.peers import End, Peers, meet
from framework.runtime.watchdog import Watchdog

# Timeout of collectives. NCCL's 10 minutes are less than rank 0 may take to index shards.
PATIENCE = timedelta(hours=1)
JOINING = 600.0  # seconds for all ranks to start and find each other
DAY = 86_400.0  # seconds; a recipe may ask for more than the timeouts of a kernel can be
RETRY = 0.5  # seconds between a rank's tries to reach rank 0
SLOW = timedelta(seconds=30)  # of which this much passes in silence
AFTER_A_DEATH = 15.0  # seconds in which ranks end by themselves; Slurm scripts give them 30


@contextmanager
def joined(run_dir: Path | None, limit: float) -> Iterator[Watchdog]:
    """Join the other ranks; inside, a rank that dies is named, and one that hangs is ended. All leave together.

    Args:
        run_dir: gets the reports of ranks that hang.
        limit: seconds in which all must have joined, and without a sign of any rank after which it hangs; in half
            the time a rank counts as dead that can't be reached.

    Raises:
        UserError: as ``start``, and as ``dead_ranks_named``.
    """
    with Watchdog(run_dir, limit) as watchdog:
        with watchdog.during("joining the other ranks"):
            peers = start(min(0.9 * limit, DAY))  # whose errors say more than a stack
        watchdog.hear(peers)
        with dead_ranks_named(peers, patience(limit)):
            yield watchdog
            stop()
        peers.leave(End.LEFT)


def patience(limit: float) -> float:
    """Seconds that a rank gets to end by itself after the death of another, of ``limit`` for all that hangs."""
    return min(AFTER_A_DEATH, limit / 5)


def start(limit: float = JOINING) -> Peers:
    """Join the other ranks: NCCL between GPUs, gloo on a machine without one.

    ``LOCAL_RANK`` becomes the number of this rank's GPU among those that it sees.

    Args:
        limit: seconds in which all must have come.

    Raises:
        UserError: incomplete launch variables, more ranks than GPUs on a machine, a port that is taken, or ranks
            that don't come.
    """
    os.environ.update(launch_variables(os.environ))
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        with _told_if_slow(limit):
            return _join(limit)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise LocalError.as_transient(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} can't meet the others at {address}:{port} "
            f"({str(error).splitlines()[0]}); all must be started, and if another run has that port, choose one with "
            "--master_port or MASTER_PORT"
        ) from error


def _join(limit: float) -> Peers:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = _store(rank, ranks, timedelta(seconds=limit))
    hosts = _meet_all(store, rank, ranks)
    peers = meet(store, rank, hosts, limit / 2)
    with dead_ranks_named(peers, patience(limit)):
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
    return peers


def _store(rank: int, ranks: int, timeout: timedelta) -> dist.Store:
    """That of torchrun's agent, or one that rank 0 has."""
    if "TORCHELASTIC_USE_AGENT_STORE" in os.environ:
        store: dist.Store = next(dist.rendezvous("env://", timeout=timeout))[0]
        store.set_timeout(timeout)
        return dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank:
        _until_reachable(address, port, timeout.total_seconds())
    return dist.TCPStore(
        *(address, port, ranks, rank == 0, timeout),
        wait_for_workers=False,  # which could not say whom it waits for
        multi_tenant=True,
    )


def _until_reachable(address: str, port: int, limit: float) -> None:
    """Wait for rank 0's store. PyTorch's own waiting passes its timeout by half, and prints a stack for each try.

    Raises:
        DistNetworkError: nobody answers within ``limit`` seconds.
    """
    end = time.monotonic() + limit
    while True:
        try:
            with socket.create_connection((address, port), timeout=max(end - time.monotonic(), 0.1)):
                return
        except OSError as error:
            if time.monotonic() + RETRY > end:
                raise dist.DistNetworkError(str(error)) from error
        time.sleep(RETRY)


def _meet_all(store: dist.Store, rank: int, ranks: int) -> list[str]:
    """Machines by rank, when all ranks have come.

    Raises:
        DistStoreError: names those that have not.
    """
    store.set(f"host/{rank}", socket.gethostname())
    keys = [f"host/{r}" for r in range(ranks)]
    try:
        store.wait(keys)
    except dist.DistStoreError as error:
        missing = [str(r) for r, key in enumerate(keys) if not store.check([key])]
        raise dist.DistStoreError(f"no sign of rank {', '.join(missing)}") from error
    return [name.decode() for name in store.multi_get(keys)]


@contextmanager
def _told_if_slow(limit: float) -> Iterator[None]:
    """Say who waits for whom where ranks take long to come."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    rank, ranks, address, port = (os.environ[name] for name in names)
    words = (
        f"rank {rank} on {socket.gethostname()} still waits for all {ranks} ranks to meet at {address}:{port}; "
        f"after {limit:g} s it gives up"
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
