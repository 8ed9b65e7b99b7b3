"""The steps that ``bench_sharding`` measures, in one process of several."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from benched_steps import build
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from framework import engines
from framework.data.batch import Batch
from framework.engines.base import EngineSettings
from framework.execution import LocalNetwork
from framework.optim import build_optimizer

Step = Callable[[], object]
COLLECTIVES = {
    "all_gather_into_tensor": "gathered",
    "all_gather_single": "gathered",  # what FSDP2 calls in newer versions of PyTorch
    "reduce_scatter_tensor": "reduced",
    "reduce_scatter_single": "reduced",
    "all_reduce": "reduced",
}


class EndToEnd(nn.Module):
    """A network with the loss of its plan's last unit, trained by backpropagation through the segments.

    Args:
        net: of one unit, over all segments.
    """

    def __init__(self, net: LocalNetwork) -> None:
        super().__init__()
        self.backbone, self.heads = net.backbone, net.heads
        self._segments, self._head = net.segments, net.plan.units[-1].head

    def forward(self, batch: Batch) -> Tensor:
        """The loss."""
        x = batch.images
        for segment in self._segments:
            x = segment(x)
        return self._head(self._head.seen(self._segments[-1], x), batch)


def measure(
    rank: int, engine: str, method: str, ranks: int, arguments: argparse.Namespace, folder: str
) -> None:
    """Train; rank 0 leaves a row in ``folder``."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    torch.ones(64, 64) @ torch.ones(64, 64)
    before = _resident("VmRSS")
    net = build(method, arguments, arguments.image_size, arguments.cut).train()
    shapes = {parameter: parameter.shape for parameter in net.parameters()}
    images = torch.randn(arguments.batch, 3, arguments.image_size, arguments.image_size)
    views = net.plan.views
    batch = Batch(images, torch.arange(arguments.batch // views), views)
    step, whole = _fsdp2(net, batch) if engine == "fsdp2" else _ours(engine, net, batch, shapes)
    step()  # makes the optimizer's state
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    seconds = []
    for _ in range(arguments.steps):
        dist.barrier()
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    peak = _resident("VmHWM")
    with _counted() as counted, _watched(net, whole) as largest:
        step()
    weights = sum(shape.numel() for shape in shapes.values())
    row = {
        "network": arguments.network,
        "engine": engine,
        "method": method,
        "ranks": ranks,
        "batch": arguments.batch,
        "image_size": arguments.image_size,
        "weight_bytes": 4 * weights,
        "state_bytes": 16 * weights,
        "largest_segment_bytes": 4
        * max(sum(shapes[p].numel() for p in s.parameters() if p in shapes) for s in net.segments)
        if engine != "fsdp2"
        else None,
        "peak_bytes": _over_ranks(peak - before),
        "whole_weights": largest[0] / weights,
        "gathered_bytes": counted.bytes["gathered"],
        "reduced_bytes": counted.bytes["reduced"],
        "seconds": _over_ranks(min(seconds)),
        "waited": _over_ranks(counted.waited),
        "alone": _over_ranks(counted.alone()),
    }
    if rank == 0:
        Path(folder, "row.json").write_text(json.dumps(row))
    dist.barrier()
    dist.destroy_process_group()


def _ours(
    engine: str, net: LocalNetwork, batch: Batch, shapes: dict[nn.Parameter, torch.Size]
) -> tuple[Step, Callable[[], int]]:
    settings = EngineSettings(len(batch.images) // batch.views * dist.get_world_size())
    made = engines.build(engine, net, partial(build_optimizer, name="adamw"), settings)
    # A vector is as long as its slice where there is one rank only.
    sliced = engine == "fsdp" and dist.get_world_size() > 1

    def whole() -> int:
        return sum(p.numel() for p, shape in shapes.items() if not sliced or p.shape == shape)

    return lambda: made.step([batch], lambda: 1e-4), whole


def _fsdp2(net: LocalNetwork, batch: Batch) -> tuple[Step, Callable[[], int]]:
    model = EndToEnd(net)
    for segment in net.segments:
        fully_shard(segment.modules())
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        model(batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    def whole() -> int:
        parameters = (p for module in net.modules() for p in module.parameters(recurse=False))
        return sum(p.numel() for p in parameters if type(p.data) is Tensor)

    return step, whole


class _Counted:
    """Collectives of a step: bytes by kind, seconds in which they were waited for, and what they take alone."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.waited = 0.0
        self._again: list[Callable[[], object]] = []

    def call(self, name: str, original: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        larger = max(tensors, key=lambda x: x.numel())
        self.bytes[COLLECTIVES[name]] += larger.numel() * larger.element_size()
        others = {key: _like(x) for key, x in kwargs.items()}
        self._again.append(partial(original, *map(_like, args), **{**others, "async_op": False}))
        started = time.perf_counter()
        work = original(*args, **kwargs)
        self.waited += time.perf_counter() - started
        return None if work is None else _Timed(work, self)

    def alone(self) -> float:
        started = time.perf_counter()
        for again in self._again:
            again()
        return time.perf_counter() - started


def _like(x: Any) -> Any:
    return torch.empty_like(x) if isinstance(x, Tensor) else x


class _Timed:
    """A collective under way."""

    def __init__(self, work: Any, counted: _Counted) -> None:
        self._work, self._counted = work, counted

    def wait(self) -> None:
        started = time.perf_counter()
        self._work.wait()
        self._counted.waited += time.perf_counter() - started


@contextmanager
def _counted() -> Iterator[_Counted]:
    counted = _Counted()
    patches = [
        mock.patch.object(dist, name, partial(counted.call, name, getattr(dist, name)))
        for name in COLLECTIVES
        if hasattr(dist, name)
    ]
    for patch in patches:
        patch.start()
    try:
        yield counted
    finally:
        for patch in patches:
            patch.stop()


@contextmanager
def _watched(net: nn.Module, whole: Callable[[], int]) -> Iterator[list[int]]:
    """The largest number of elements that ``whole`` gives before any module of the network runs."""
    largest = [0]

    def look(*_: object) -> None:
        largest[0] = max(largest[0], whole())

    handles = [module.register_forward_hook(look) for module in net.modules()]
    yield largest
    for handle in handles:
        handle.remove()


def _resident(kind: str) -> int:
    """Bytes of this process in memory: "VmRSS" now, "VmHWM" at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(kind))
    return int(line.split()[1]) * 1024


def _over_ranks(number: float) -> float:
    largest = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)
