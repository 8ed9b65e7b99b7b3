"""A rank that dies, seen from the others: who they say it was, how they end, and what is left."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch.distributed as dist

from framework.checkpoints.run_checkpoints import newest_checkpoint
from framework.data.packing.digits import CLASSES as DIGITS
from framework.data.packing.digits import prepare_digits
from framework.data.packing.writer import write_shards
from framework.data.shards.index import ShardSet
from framework.runtime import distributed, joining
from framework.runtime.command import status
from framework.runtime.dead_ranks import dead_ranks_named
from framework.runtime.errors import LocalError
from framework.runtime.exit_status import EXIT_TRY_AGAIN, EXIT_USAGE
from framework.runtime.launch import LAUNCH_VARIABLES
from framework.runtime.peers import End, meet
from tests.support.forked import Forked
from tests.support.marks import slow, soak
from tests.support.pool import Pool
from tests.support.ports import free_port
from tests.support.ranks import Ranks, Trouble
from tests.support.runs import ROOT, assert_same_run, toy
from tests.support.waiting import until

RECIPE = str(ROOT / "recipes" / "loco_r50_800ep.yaml")
STAGES, STEPS = 3, 60
TIMEOUT = 3600.0  # pipeline.timeout; who waits for it, instead of noticing the death, fails the test
PoolOf = Callable[[int], Pool]


def arguments(folder: Path, *overrides: str) -> list[str]:
    length = (f"train.max_steps={STEPS}", "train.epochs=20", "checkpoint.every_steps=5", "data.workers=0")
    stages = (f"pipeline.stages={STAGES}", f"pipeline.timeout={TIMEOUT}")
    return [RECIPE, *toy(folder, *length, *stages, *overrides)]


def saved(folder: Path) -> list[Path]:
    return sorted((folder / "run" / "checkpoints").glob("step-*"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, pool: PoolOf) -> Path:
    """The run to compare with; ``pool`` has the server import what ranks need."""
    folder = tmp_path_factory.mktemp("lost") / "undisturbed"
    finish(folder)
    return folder


def finish(folder: Path) -> None:
    """Run, or go on, to the end."""
    with Ranks(arguments(folder), STAGES, folder / "record") as ranks:
        assert ranks.statuses() == [0] * STAGES, ranks.printed


@pytest.mark.parametrize("victim", [*slow([0]), *soak([2])])
def test_all_name_the_stage_that_died_and_the_run_goes_on(
    tmp_path: Path, undisturbed: Path, victim: int
) -> None:
    """The stage at the other end has no message from the one that died, and names it all the same."""
    with Ranks(arguments(tmp_path), STAGES, tmp_path / "record") as ranks:
        ranks.until(lambda: len(saved(tmp_path)) > 0)
        ranks.signal(signal.SIGKILL, victim)
        assert ranks.statuses() == [-signal.SIGKILL if r == victim else EXIT_TRY_AGAIN for r in range(STAGES)]
    errors = [line.split(" (")[0] for line in ranks.printed.splitlines() if line.startswith("error: ")]
    others = [r for r in range(STAGES) if r != victim]
    assert errors == [f"error: rank {r}: rank {victim} died or can't be reached" for r in others]
    assert "Traceback" not in ranks.printed
    finish(tmp_path)
    assert_same_run(tmp_path, undisturbed, STEPS)


@pytest.mark.slow
def test_an_error_that_one_stage_meets_is_no_death(tmp_path: Path, undisturbed: Path) -> None:
    """The others must not say that the same command would go on."""
    trouble = Trouble(0, "refuse", at_step=3)
    with Ranks(arguments(tmp_path), STAGES, tmp_path / "record", trouble) as ranks:
        assert ranks.statuses() == [EXIT_USAGE] * STAGES, ranks.printed
    errors = [line for line in ranks.printed.splitlines() if line.startswith("error: ")]
    assert errors[0] == "error: rank 0: these images are no good"
    assert all(f"rank {r}: rank 0 stopped with an error" in errors[r] for r in range(1, STAGES))


@pytest.mark.slow
def test_images_that_one_rank_can_not_score_on_are_named_and_cost_no_step(
    tmp_path: Path, pool: PoolOf
) -> None:
    """The epoch is saved by then."""
    data = tmp_path / "data"
    prepare_digits(data / "whole")
    whole = ShardSet.open(data / "whole" / "test")
    half = len(whole) // 2  # the second half is rank 1's
    images = [whole.read(i) if i < half or i % 4 else b"no image" for i in range(len(whole))]
    write_shards(((f"{i}", image, "png", i % 10) for i, image in enumerate(images)), data / "test", DIGITS)
    (data / "whole" / "train").rename(data / "train")
    every = ("evaluate.every_epochs=1", "checkpoint.every_epochs=1", "train.max_steps=30")
    more = (f"data.path={data}", "data.prepare=none", "data.workers=0", "evaluate.knn=true", *every)
    argv = [str(ROOT / "recipes/quickstart.yaml"), *toy(tmp_path, *more)]
    with Ranks(argv, 2, tmp_path / "record") as ranks:
        assert ranks.statuses() == [EXIT_USAGE] * 2, ranks.printed
    errors = [line for line in ranks.printed.splitlines() if line.startswith("error: ")]
    assert f"error: rank 1: {data / 'test'}: 45 of 180 images are broken" in errors[1]
    assert "error: rank 0: rank 1 stopped with an error" in errors[0]
    assert [folder.name for folder in saved(tmp_path)] == ["step-00000022"]


def trains_without_names(port: int) -> tuple[float, list[str]]:
    """Ranks between which there is no way but for the training itself."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_ADDR", "192.0.2.1")  # nobody's (RFC 5737)
        logging.getLogger("framework.runtime.peers").addHandler(handler)
        store = dist.TCPStore("127.0.0.1", port, 2, distributed.is_main(), wait_for_workers=False)
        try:
            others = meet(store, distributed.rank(), ["here", "here"], 2.0)
            with dead_ranks_named(others, patience=1.0):
                return distributed.sum_over_ranks(distributed.rank() + 1), records
        finally:
            others.leave(End.LEFT)
            logging.getLogger("framework.runtime.peers").removeHandler(handler)


def test_ranks_that_can_not_be_named_train_all_the_same(pool: PoolOf) -> None:
    (one, (warning,)), (other, silent) = pool(2).run(trains_without_names, free_port())
    assert one == other == 3 and not silent
    assert warning.startswith("ranks that die won't be named: rank 1 can't connect to rank 0 at 192.0.2.1:")


def joins(rank: int, port: int, fate: str) -> int:
    """Rank 1 has that fate; the others wait outside of any collective, as in a kernel of NCCL that never ends."""
    os.environ.update(zip(LAUNCH_VARIABLES, (str(rank), "3", "0", "127.0.0.1", str(port)), strict=True))

    def work() -> None:
        with joining.joined(None, limit=20.0):
            if rank != 1:
                time.sleep(600)
            if fate == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if fate == "is interrupted":
                raise LocalError.as_transient("rank 1: a file server is away")
            raise LocalError("rank 1: this image is no good")

    return status(work)


@pytest.mark.parametrize(
    ("fate", "statuses", "message"),
    [
        ("dies", [EXIT_TRY_AGAIN, -signal.SIGKILL], "rank 1 died or can't be reached (on "),
        *slow([("errs", [EXIT_USAGE, EXIT_USAGE], "rank 1 stopped with an error, which tells what to mend")]),
        *slow([("is interrupted", [EXIT_TRY_AGAIN] * 2, "rank 1 stopped with an error, which")]),
    ],
)
@pytest.mark.usefixtures("pool")
def test_who_waits_for_ever_learns_of_it(
    tmp_path: Path, fate: str, statuses: list[int], message: str
) -> None:
    """No collective fails, and yet all end: with the others' status, so that a mistake is not tried again."""
    port = free_port()
    with ExitStack() as stack:
        ranks = [stack.enter_context(Forked(tmp_path / f"{r}", joins, r, port, fate)) for r in range(3)]
        assert [rank.status() for rank in ranks] == [statuses[0], statuses[1], statuses[0]]
        for number in (0, 2):
            (line,) = ranks[number].stderr.splitlines()
            assert line.startswith(f"error: rank {number}: {message}")


def ranks_of(folder: Path) -> dict[str, int]:
    """Processes that train into a folder, by the launcher's argument for the rank."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_text().split("\0")
        except OSError:
            continue  # it has ended meanwhile
        if f"run_dir={folder / 'run'}" in line:
            found[next((word for word in line if word.startswith("--local_rank=")), "")] = int(process.name)
    return found


@pytest.mark.soak
def test_the_launcher_leaves_no_process_when_a_stage_is_killed(tmp_path: Path) -> None:
    program = str(Path(sys.executable).with_name("deepspeed"))
    command = [program, "--num_gpus", str(STAGES), "--master_port", str(free_port())]
    with (tmp_path / "printed").open("w") as printed:
        launcher = subprocess.Popen(
            [
                *command,
                "framework/train.py",
                *arguments(tmp_path, "train.epochs=1000", "train.max_steps=9999"),
            ],
            cwd=ROOT,
            stdout=printed,
            stderr=printed,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        try:
            until(lambda: bool(saved(tmp_path)) or launcher.poll() is not None)
            assert launcher.poll() is None
            os.kill(ranks_of(tmp_path)["--local_rank=2"], signal.SIGKILL)
            assert launcher.wait() != 0
            until(lambda: not ranks_of(tmp_path), otherwise="a rank survived")
        finally:
            for process in ranks_of(tmp_path).values():
                os.kill(process, signal.SIGKILL)
    said = (tmp_path / "printed").read_text()
    assert "rank 2 died or can't be reached" in said or "--local_rank=2'" in said.splitlines()[-1]
    assert newest_checkpoint(tmp_path / "run") is not None
