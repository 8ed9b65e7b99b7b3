"""Containers give workers a /dev/shm of 64 MB, and some less."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from framework.config.views import Views
from framework.data.loading.loader import EvalLoader
from framework.data.packing.digits import prepare_digits
from framework.data.shards.index import ShardSet
from framework.runtime.errors import UserError
from framework.runtime.exit_status import EXIT_USAGE
from tests.support.forked import Forked
from tests.support.marks import slow
from tests.support.ranks import Ranks, Trouble, small_shm
from tests.support.runs import ROOT, toy

pytestmark = [
    pytest.mark.usefixtures("pool"),  # its server forks the processes
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may have a /dev/shm of its own"),
]
REMEDY = "give the container more by --shm-size, or set data.workers=0"


def reads(folder: Path, size: str) -> None:
    small_shm(size)
    for workers in (1, 0):
        loader = EvalLoader(
            ShardSet.open(folder),
            Views(),
            image_size=64,
            batch_size=100,
            rank=0,
            world_size=1,
            workers=workers,
            device="cpu",
        )
        try:
            print(f"{workers}: {sum(len(images) for _, images, _ in loader)} images", flush=True)
        except UserError as error:
            print(f"{workers}: {error}", flush=True)


@pytest.mark.parametrize(("size", "mib"), [("1m", "1"), *slow([("4k", "0.00391")])])  # not even locks
def test_too_little_shared_memory_is_one_line(tmp_path: Path, size: str, mib: str) -> None:
    prepare_digits(tmp_path / "digits")
    with Forked(tmp_path / "process", reads, tmp_path / "digits" / "test", size) as process:
        assert process.status() == 0
    assert process.stdout.splitlines() == [
        "1: workers can't hand over their images in shared memory "
        f"(/dev/shm, {mib} MiB: No space left on device): {REMEDY}",
        "0: 360 images",
    ]
    assert shutil.disk_usage("/dev/shm").total > 2**21, "the machine's own is as it was"


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "batch"), [(0, 512), (2, 64)], ids=["training", "scoring"])
def test_a_rank_whose_machine_has_too_little_ends_all(tmp_path: Path, steps: int, batch: int) -> None:
    """With the status of a mistake, which is not tried again, and at once."""
    more = ("data.image_size=32", f"train.batch_size={batch}", "train.max_steps=2", "evaluate.knn=true")
    argv = [str(ROOT / "recipes" / "loco_r50_800ep.yaml"), *toy(tmp_path, *more, "engine=ddp")]
    with Ranks(argv, 2, tmp_path / "record", Trouble(1, "small shm")) as ranks:
        assert ranks.statuses() == [EXIT_USAGE] * 2, ranks.printed
    errors = [line for line in ranks.printed.splitlines() if line.startswith("error: ")]
    assert errors[0] == "error: rank 0: rank 1 stopped with an error, which tells what to mend"
    assert errors[1].startswith("error: rank 1: workers can't hand over") and errors[1].endswith(REMEDY)
    log = tmp_path / "run" / "metrics.jsonl"
    assert sum(b'"losses"' in line for line in log.read_bytes().splitlines()) == steps
