"""A standing pool of gloo ranks on the CPU, so that a distributed test costs a message and not a start.

Workers are forked from a server that has imported the heavy libraries once.
"""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any

from tests.support.waiting import PATIENCE

CONTEXT = mp.get_context("forkserver")
# What ranks import: once for all of them, since each is a fork of the server.
PRELOAD = [
    "framework.train",
    "framework.training.run",
    "framework.engines.ddp",
    "framework.engines.deepspeed",
    "framework.engines.fsdp",
    "framework.pipeline.engine",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # ZeRO imports it, and with it torch's compiler
    "tests.support.networks",
    "tests.support.training",
    "pytest",
]


def start_server() -> None:
    """Begin importing in the background; the first worker waits for it."""
    CONTEXT.set_forkserver_preload(PRELOAD)
    before = dict(os.environ)
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    forkserver.ensure_running()  # passes the environment on to every worker
    os.environ.clear()
    os.environ.update(before)


class Pool:
    """``world_size`` processes that have joined one process group and wait for functions to run."""

    def __init__(self, world_size: int) -> None:
        from torch.distributed import TCPStore

        # Ours and open, where a port that was only found free may be another's by the time rank 0 listens.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(
                target=_serve, args=(theirs, rank, world_size, self._store.port), daemon=True
            )
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = PATIENCE) -> list[Any]:
        """Results of ``function(*args)`` on every rank, in rank order. The function is pickled by its name.

        Raises:
            RuntimeError: with the traceback of the first rank that failed; the pool is closed, since the
                other ranks may wait in a collective for ever. So it is when ``timeout`` seconds pass.
        """
        for connection in self._connections:
            connection.send((function, args))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while len(results) < len(self._connections):
            waiting = [c for rank, c in enumerate(self._connections) if rank not in results]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                self._fail(
                    f"ranks {[r for r in range(len(self._connections)) if r not in results]}: {timeout} s passed"
                )
            for connection in ready:
                rank = self._connections.index(connection)
                results[rank] = self._receive(rank)
        return [results[rank] for rank in sorted(results)]

    def _receive(self, rank: int) -> Any:
        try:
            result, error = self._connections[rank].recv()
        except EOFError:
            self._processes[rank].join()
            self._fail(f"rank {rank} died with exit code {self._processes[rank].exitcode}")
        if error:
            self._fail(f"rank {rank}:\n{error}")
        return result

    def _fail(self, message: str) -> None:
        self.close()
        raise RuntimeError(message)

    @property
    def closed(self) -> bool:
        """Whether the processes are gone."""
        return not self._processes

    def close(self) -> None:
        """End the processes of this pool, and only those."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []


def _serve(connection: Connection, rank: int, world_size: int, port: int) -> None:
    import torch

    from framework.runtime import joining
    from framework.runtime.launch import LAUNCH_VARIABLES

    os.environ.update(
        TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0"
    )  # the store is there
    values = (rank, world_size, rank, "127.0.0.1", port)
    os.environ.update(zip(LAUNCH_VARIABLES, map(str, values), strict=True))
    torch.set_num_threads(1)
    gc.freeze()  # a collection need not walk through all that was imported
    joining.start()
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        try:
            connection.send((function(*args), None))
        except Exception:
            connection.send((None, traceback.format_exc()))
