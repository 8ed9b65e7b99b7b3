"""Steps of data parallelism whose gradients travel: what ``bench_step --wire`` and ``--ranks`` time."""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from benched_steps import CLASSES, CONTRASTIVE, build
from rich.console import Console
from rich.table import Table
from simulated_wire import Recorder, Step
from slow_wire import Silence, SlowWire
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from framework.data.batch import Batch
from framework.engines.base import EngineSettings
from framework.engines.late import LateUpdates, Ranks, Wire
from framework.execution.local_network import LocalNetwork
from framework.optim import SGD
from framework.runtime.distributed import is_main, world_size

LR = 1e-3


class Training(NamedTuple):
    """One way to train.

    Attributes:
        step: makes a step, some updates of which may be left to the next.
        finish: makes those.
    """

    step: Callable[[], object]
    finish: Callable[[], None]


class EndToEnd(nn.Module):
    """The network under its one loss, through which autograd goes back."""

    def __init__(self, network: LocalNetwork) -> None:
        super().__init__()
        self.network = network
        (self.head,) = network.plan.heads

    def forward(self, batch: Batch) -> Tensor:
        """The loss."""
        x = batch.images
        for segment in self.network.segments:
            x = segment(x)
        loss: Tensor = self.head(self.head.seen(self.network.segments[-1], x), batch)
        return loss


def ddp(network: LocalNetwork, batch: Batch, wire: Wire) -> Training:
    """PyTorch's DistributedDataParallel: buckets are averaged while backpropagation goes on."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # broadcast_buffers has another name from PyTorch 2.13 on
        wrapped = DistributedDataParallel(
            EndToEnd(network), broadcast_buffers=False, gradient_as_bucket_view=True
        )
    if not isinstance(wire, Ranks):
        wrapped.register_comm_hook(wire, lambda wire, bucket: _sent(wire, bucket.buffer()))
    optimizer = SGD(network.parameters(), lr=LR, momentum=0.9)

    def step() -> None:
        wrapped(batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Training(step, lambda: None)


def _sent(wire: Wire, bucket: Tensor) -> torch.futures.Future[Tensor]:
    """DDP's hook: a thread that does nothing but sleep says when the bucket is there."""
    arrived: torch.futures.Future[Tensor] = torch.futures.Future()
    pending = wire.sum(bucket)

    def travel() -> None:
        pending.wait()
        arrived.set_result(bucket)

    threading.Thread(target=travel).start()
    return arrived


def late(network: LocalNetwork, batch: Batch, wire: Wire) -> Training:
    """This package's data parallelism."""
    optimizer = SGD(network.parameters(), lr=LR, momentum=0.9)
    updates = LateUpdates(network, optimizer, 0.0, wire, max(2, world_size()))
    return Training(lambda: updates.step([batch], lambda: LR), updates.finish)


def zero(stage: int, network: LocalNetwork, batch: Batch, wire: SlowWire | Silence | Ranks) -> Training:
    """The same under ZeRO."""
    from framework.engines.deepspeed import DeepSpeedEngine  # takes seconds to import

    settings = EngineSettings(batch.images.shape[0] * world_size(), zero_stage=stage)
    engine = DeepSpeedEngine(
        network,
        lambda net: SGD(net.parameters(), lr=LR, momentum=0.9),
        settings,
        None if isinstance(wire, Ranks) else wire,
    )
    return Training(lambda: engine.step([batch], lambda: LR), engine.finish)


def seconds(training: Training, wait: bool) -> float:
    """Of one step in a row of steps; ``wait``: until all its gradients are there and applied."""
    training.step()
    if wait:
        training.finish()
    _meet()
    start = time.perf_counter()
    training.step()
    if wait:
        training.finish()
    _meet()
    took = time.perf_counter() - start
    training.finish()
    return took


def _meet() -> None:
    if world_size() > 1:
        dist.barrier()


def row(method: str, cut: str | int, arguments: argparse.Namespace) -> dict[str, Any]:
    """What is hidden of a method's communication, in each way to train it; "ddp" is PyTorch's, end to end."""
    network, batch = _built(method, cut, arguments)
    make = ddp if method == "ddp" else partial(zero, arguments.zero_stage) if arguments.zero_stage else late
    wire: SlowWire | Ranks = Ranks() if world_size() > 1 else SlowWire()
    silent, wired = make(copy.deepcopy(network), batch, Silence()), make(network, batch, wire)
    seconds(wired, wait=True)  # two steps, which tell how much travels
    step_bytes = wire.bytes / 2 if isinstance(wire, SlowWire) else 0.0
    compute = [seconds(silent, wait=True)]
    found: dict[str, list[tuple[float, float]]] = {"early": [], "late": []}
    travel = 0.0
    for _ in range(arguments.rounds):
        compute.append(seconds(silent, wait=True))
        if isinstance(wire, SlowWire):
            travel = min(compute) * arguments.wire / (1 - arguments.wire)
            wire.rate = step_bytes / travel
        else:
            travel = _alone(network, wire)
        for name, wait in {"early": True, "late": False}.items():
            took = seconds(wired, wait)
            found[name].append((took, travel))
    wire.close()
    least = min(compute)
    hidden = {
        name: max(1 - (took - least) / travel for took, travel in times) for name, times in found.items()
    }
    return {
        "method": method,
        "cut": cut,
        "segments": len(network.segments),
        "ranks": world_size(),
        "wire": arguments.wire,
        "zero_stage": 0 if method == "ddp" else arguments.zero_stage,
        "travel_seconds": travel,
        "compute_seconds": least,
        "early_seconds": min(took for took, _ in found["early"]),
        "late_seconds": None if method == "ddp" else min(took for took, _ in found["late"]),
        "hidden_early": hidden["early"],
        "hidden_late": None if method == "ddp" else hidden["late"],
    }


def _built(method: str, cut: str | int, arguments: argparse.Namespace) -> tuple[LocalNetwork, Batch]:
    size = arguments.image_size or 128
    views = 2 if method == "ddp" or method in CONTRASTIVE else 1
    images = torch.randn(arguments.batch, 3, size, size)
    labels = None if views == 2 else torch.randint(CLASSES, (arguments.batch,))
    return build("simclr" if method == "ddp" else method, arguments, size, cut), Batch(images, labels, views)


def recorded(methods: list[str], arguments: argparse.Namespace) -> dict[str, Step]:
    """The fastest step of PyTorch's DDP end to end, and of every method, without communication."""
    steps: dict[str, Step] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        for method in ["ddp", *methods]:
            wire = Recorder()
            training = (ddp if method == "ddp" else late)(*_built(method, arguments.cut, arguments), wire)
            found = []
            for _ in range(2 + arguments.rounds):
                wire.begin()
                start = time.perf_counter()
                training.step()
                found.append(Step(time.perf_counter() - start, wire.events))
            steps[method] = min(found[2:])
        dist.destroy_process_group()
    return steps


def _alone(network: LocalNetwork, wire: Ranks) -> float:
    """Seconds that all gradients take when nothing else goes on."""
    whole = torch.zeros(sum(p.numel() for p in network.parameters() if p.requires_grad))
    found = []
    for _ in range(4):
        _meet()
        start = time.perf_counter()
        wire.sum(whole).wait()
        _meet()
        found.append(time.perf_counter() - start)
    return min(found[1:])


def rows(methods: list[str], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """PyTorch's DDP end to end, and every method, each measured in one process or in ``arguments.ranks``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        if arguments.ranks == 1:
            _measure(0, methods, arguments, folder)
        else:
            processes.spawn(_measure, (methods, arguments, folder), arguments.ranks)
        found: list[dict[str, Any]] = json.loads(path.read_text())
        return found


def _measure(rank: int, methods: list[str], arguments: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(arguments.threads)
    os.environ["LOCAL_RANK"] = str(rank)  # DeepSpeed asks for it
    store = dist.FileStore(f"{folder}/store", arguments.ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=arguments.ranks)
    cut = arguments.modules or arguments.cut or "stage"
    found = []
    for method in ["ddp", *methods]:
        found.append(row(method, cut, arguments))
        if is_main():
            one = found[-1]
            print(f"{method}: {one['compute_seconds']:.2f} s and {one['travel_seconds']:.2f} s", flush=True)
    if is_main():
        Path(folder, "rows.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _name(row: dict[str, Any]) -> str:
    if row["method"] == "ddp":
        return "end to end, PyTorch's DDP"
    return f"{row['method']}, ZeRO-{row['zero_stage']}" if row["zero_stage"] else str(row["method"])


def show(found: list[dict[str, Any]]) -> None:
    """Print the rows as a table."""
    wire = "gloo" if found[0]["ranks"] > 1 else f"a wire with {found[0]['wire']:g} of the step"
    table = Table(title=f"share of communication that is hidden, {found[0]['ranks']} rank(s), {wire}")
    for column in (
        "method",
        "cut",
        "segments",
        "compute s",
        "travel s",
        "updates at the end",
        "late updates",
    ):
        table.add_column(column, justify="left" if column in ("method", "cut") else "right")
    for r in found:
        table.add_row(
            _name(r),
            str(r["cut"]),
            str(r["segments"]),
            f"{r['compute_seconds']:.2f}",
            f"{r['travel_seconds']:.2f}",
            f"{r['hidden_early']:.2f}",
            "-" if r["hidden_late"] is None else f"{r['hidden_late']:.2f}",
        )
    Console(width=110).print(table)
