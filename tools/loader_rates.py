"""What ``bench_loader.py`` measures: images per second of every loader, and opening an index of many samples."""

from __future__ import annotations

import argparse
import io
import multiprocessing
import statistics
import tempfile
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from other_loaders import Pass, imagefolder_passes, litdata_passes, webdataset_passes
from PIL import Image
from torch.utils.data import DataLoader

from framework.data.augment.crops import random_box, resized
from framework.data.augment.views import Views
from framework.data.loading.decode import decode
from framework.data.loading.loader import TrainLoader
from framework.data.loading.sample_order import TrainJobs
from framework.data.loading.worker import Decoder
from framework.data.packing.writer import write_shards
from framework.data.shards.index import ShardSet
from framework.data.shards.shard_contents import Contents
from framework.data.shards.shard_contents import Table as Samples
from framework.tracking.environment import environment

train_loader = partial(TrainLoader, accumulation=1, rank=0, world_size=1, seed=0, workers=0, device="cpu")


def trained_passes(
    shards: ShardSet, size: int, batch: int, kinds: tuple[str, ...], **more: Any
) -> dict[str, Pass]:
    """Whole batches through our loader, as training gets them."""

    def trained(kind: Any) -> Pass:
        views = 2 if kind == "simclr" else 1
        loader = train_loader(
            shards, Views(kind=kind), image_size=size, batch_size=batch, views_per_image=views, **more
        )

        def run() -> int:
            steps = loader.steps(0, loader.steps_per_epoch)
            return sum(len(batch.images) // views for (batch,) in steps)

        return run

    return {kind: trained(kind) for kind in kinds}


def our_passes(shards: ShardSet, size: int, batch: int, kinds: tuple[str, ...]) -> dict[str, Pass]:
    """The same, and its parts."""

    def decoded() -> int:
        return sum(1 for i in range(len(shards)) if decode(shards.read(i)) is not None)

    def crops() -> int:
        jobs = TrainJobs(shards.table.shard, batch, 1, 0, 1, seed=0)
        jobs.steps = range(len(shards) // batch)
        decoder = Decoder(shards, Views(), size, views_per_image=2, seed=0)
        loader = DataLoader(decoder, sampler=jobs, batch_size=None, collate_fn=lambda drawn: drawn)
        return sum(len(drawn.samples) for drawn in loader)

    return {"decode": decoded, "crops": crops, **trained_passes(shards, size, batch, kinds)}


def bare_passes(shards: ShardSet, size: int) -> dict[str, Pass]:
    """The same work in a plain loop over bytes in memory."""
    images = [shards.read(i) for i in range(len(shards))]
    generator = np.random.default_rng(0)
    views = Views()

    def decoded() -> int:
        return sum(1 for data in images if decode(data) is not None)

    def crops() -> int:
        for data in images:
            image = decode(data)
            height, width = image.shape[1:]
            for _ in range(2):
                box = random_box(width, height, views.area, views.aspect, generator.random(40))
                resized(image, box, (size, size))
        return len(images)

    return {"decode": decoded, "crops": crops}


def seconds(gpu: bool) -> float:
    """Processor time; where a GPU works, the clock."""
    if not gpu:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(passes: dict[str, Pass], rounds: int, gpu: bool) -> dict[str, float]:
    """Median images per second of each; they take turns, after one round to warm up."""
    rates: dict[str, list[float]] = {name: [] for name in passes}
    for round_ in range(rounds + 1):
        for name, run in passes.items():
            start = seconds(gpu)
            images = run()
            if round_:
                rates[name].append(images / (seconds(gpu) - start))
    return {name: statistics.median(rate) for name, rate in rates.items()}


def rates(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per view and loader."""
    shards = ShardSet.open(arguments.shards)
    size, batch = arguments.image_size, arguments.batch
    if len(shards) % batch:
        batch = next(b for b in range(batch, 0, -1) if len(shards) % b == 0)  # the same images for everyone
    kinds = (*(("cifar",) if arguments.memory else ()), "supervised", "simclr")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch, name) for name in ("files", "litdata")]
        for folder in folders:
            folder.mkdir()
        loaders = {
            "ours": our_passes(shards, size, batch, kinds),
            "bare": bare_passes(shards, size),
            "webdataset": webdataset_passes(shards, size, batch),
            "imagefolder": imagefolder_passes(shards, size, batch, folders[0]),
        }
        if find_spec("litdata"):
            loaders["litdata"] = litdata_passes(shards, size, batch, folders[1])
        gpu = arguments.memory and torch.cuda.is_available()
        if arguments.memory:
            device = "cuda" if gpu else "cpu"
            loaders["memory"] = trained_passes(shards, size, batch, kinds, in_memory=True, device=device)
        for view in loaders["ours"]:
            passes = {name: offered[view] for name, offered in loaders.items() if view in offered}
            for name, rate in measure(passes, arguments.rounds, gpu).items():
                rows.append(
                    {"view": view, "loader": name, **timed(rate, gpu, on_gpu=gpu and name == "memory")}
                )
    return rows


def timed(rate: float, gpu: bool, on_gpu: bool) -> dict[str, Any]:
    """A rate under a name that says what it is of, where the images were made, and by which clock."""
    return {
        "images_per_second" if gpu else "images_per_second_per_core": round(rate, 1),
        "device": environment(1, torch.device("cuda" if on_gpu else "cpu"))["device"],
        "clock": "wall" if gpu else "processor",
    }


def made_up(samples: int) -> list[dict[str, Any]]:
    """Start-up and going on at 90 % of an epoch, on an index of so many samples, in a fresh process."""
    with tempfile.TemporaryDirectory() as scratch:
        _make_up(Path(scratch), samples)
        rows = []
        for name, share in (("start-up", 0.0), ("resume", 0.9)):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, megabytes = pool.apply(_first_batch, (Path(scratch), share))
            rows.append(
                {
                    "view": name,
                    "loader": "ours",
                    "samples": samples,
                    "seconds": seconds,
                    "megabytes": megabytes,
                }
            )
    return rows


def _make_up(folder: Path, samples: int) -> None:
    """Shards of 1000 samples, all of which are the one image that a shard really has."""
    one = folder / "one"
    write_shards([("0", _png(), "png", 0)], one, None)
    first = ShardSet.open(one)
    shards = -(-samples // 1000)
    names = [f"shard-{number:06d}.tar" for number in range(shards)]
    for name in names:
        (folder / name).hardlink_to(one / "shard-000000.tar")
    rows = [np.full(samples, column[0], column.dtype) for column in first.table[1:]]
    table = Samples(np.arange(samples, dtype=np.int32) // 1000, *rows)
    Contents(dict.fromkeys(names, first.shards["shard-000000.tar"]), table, None, {}).save(folder)


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "png")
    return buffer.getvalue()


def _first_batch(folder: Path, share: float) -> tuple[float, float]:
    """Seconds from nothing but imports to the first batch of 256, and the memory that took in MB."""
    before, start = _memory("VmRSS"), time.perf_counter()
    window = 100_000 if share else 0
    shards = ShardSet.open(folder)
    loader = train_loader(
        shards, Views(kind="none"), image_size=32, batch_size=256, views_per_image=1, window=window
    )
    step = int(share * loader.steps_per_epoch)
    next(loader.steps(step, step + 1))
    seconds = time.perf_counter() - start
    return round(seconds, 3), round(_memory("VmHWM") - before, 1)


def _memory(field: str) -> float:
    """MB of this process now (VmRSS) or at most (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) / 1000
