"""Runs that are killed, signaled, starved of disk, poisoned and frozen: what they lose, which is nothing."""

from __future__ import annotations

import contextlib
import json
import random
import resource
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from framework.checkpoints.folder import FILES, MANIFEST
from framework.checkpoints.run_checkpoints import newest_checkpoint
from framework.runtime.exit_status import EXIT_TRY_AGAIN, EXIT_USAGE
from tests.support.marks import slow, soak
from tests.support.pool import Pool
from tests.support.ranks import Ranks, Trouble, samples
from tests.support.runs import ROOT, assert_same_run, losses, run, toy, weights

RECIPE = str(ROOT / "recipes" / "loco_r50_800ep.yaml")
STEPS = 40
PoolOf = Callable[[int], Pool]
Start = Callable[..., Ranks]


def arguments(folder: Path, *overrides: str) -> list[str]:
    """A run of ``STEPS`` steps that saves after every second."""
    length = (f"train.max_steps={STEPS}", "train.epochs=10", "checkpoint.every_steps=2", "data.workers=0")
    return [RECIPE, *toy(folder, *length, *overrides)]


def start(
    folder: Path, *overrides: str, trouble: Trouble | None = None, world: int = 2, **variables: str
) -> Ranks:
    """Start, or start again, the run in ``folder``."""
    return Ranks(arguments(folder, *overrides), world, folder / "record", trouble, variables)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, pool: PoolOf) -> Path:
    """The run to compare with; ``pool`` has the server imported what ranks need."""
    folder = tmp_path_factory.mktemp("faults") / "undisturbed"
    with start(folder) as ranks:
        assert ranks.statuses() == [0, 0], ranks.printed
    return folder


def finish(folder: Path, *overrides: str) -> None:
    """Start again and run to the end."""
    with start(folder, *overrides) as ranks:
        assert ranks.statuses() == [0, 0], ranks.printed


def steps_done(folder: Path) -> int:
    log = folder / "run" / "metrics.jsonl"
    return sum(b'"losses"' in line for line in log.read_bytes().splitlines()) if log.exists() else 0


def half_written(folder: Path) -> set[tuple[str, int]]:
    """Checkpoints that are being written, or were when somebody was killed; with their times."""
    found = set()
    for partial in folder.glob("run/checkpoints/.step-*.partial"):
        with contextlib.suppress(FileNotFoundError):  # it has just been renamed
            found.add((partial.name, partial.stat().st_mtime_ns))
    return found


def kill_somewhere(folder: Path, chance: random.Random, *overrides: str) -> str | None:
    """Start, and kill one rank: in mid-step, in mid-save or in mid-rename; which of them, ``None`` if it got away."""
    moments = {
        "mid-save": Trouble(0, "kill", event="open", path=".partial/state.json", count=chance.randint(1, 3)),
        "mid-rename": Trouble(0, "kill", event="os.rename", path=".partial", count=chance.randint(2, 4)),
        "after the rename": Trouble(0, "kill", event="open", path="checkpoints", count=chance.randint(1, 3)),
        "mid-step": None,
        "mid-write": None,
    }
    moment = chance.choice(list(moments))
    left = half_written(folder)
    with start(folder, *overrides, trouble=moments[moment]) as ranks:
        if moment == "mid-step":
            before = steps_done(folder)
            ranks.until(lambda: steps_done(folder) > before or not ranks.processes[0].is_alive())
            time.sleep(chance.uniform(0, 0.3))
            ranks.signal(signal.SIGKILL, chance.randrange(2))
        elif moment == "mid-write":
            ranks.until(lambda: half_written(folder) - left or not ranks.running)
            time.sleep(chance.uniform(0, 0.01))
            ranks.signal(signal.SIGKILL, 0)
        ranks.first_end()
        killed = any(process.exitcode == -signal.SIGKILL for process in ranks.processes)
    return moment if killed else None


@pytest.mark.slow
def test_a_run_that_was_killed_is_the_undisturbed_one(tmp_path: Path, undisturbed: Path) -> None:
    chance = random.Random(1)
    for _ in range(3):
        kill_somewhere(tmp_path, chance)
    finish(tmp_path)
    assert_same_run(tmp_path, undisturbed, STEPS)
    assert samples(tmp_path / "record") == samples(undisturbed / "record")
    assert not list(tmp_path.glob("run/checkpoints/.*")), "half-written folders are left"


@pytest.mark.soak
def test_twenty_five_kills_lose_nothing(tmp_path: Path) -> None:
    long, whole, torn = "train.max_steps=200", tmp_path / "whole", tmp_path / "torn"
    finish(whole, long)
    chance = random.Random(0)
    kills = [kill_somewhere(torn, chance, long) for _ in range(25)]
    finish(torn, long)
    assert_same_run(torn, whole, 200)
    assert samples(torn / "record") == samples(whole / "record")
    assert None not in kills and len(set(kills)) == 5, kills


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20))
def test_a_run_with_trouble_of_every_kind_loses_nothing(tmp_path: Path, undisturbed: Path, seed: int) -> None:
    chance = random.Random(seed)
    kill_somewhere(tmp_path, chance)
    leave(tmp_path, chance.choice([signal.SIGTERM, signal.SIGUSR1]), chance.randrange(2))
    damage_newest(tmp_path, chance)
    kill_somewhere(tmp_path, chance)
    finish(tmp_path)
    assert_same_run(tmp_path, undisturbed, STEPS)
    assert samples(tmp_path / "record") == samples(undisturbed / "record")


def damage_newest(folder: Path, chance: random.Random) -> None:
    """Flip a bit of one file of the newest checkpoint, or cut it off."""
    newest = newest_checkpoint(folder / "run")
    if newest is None or len(list(newest.parent.glob("step-*"))) < 2:
        return
    file = newest / chance.choice([*FILES, MANIFEST])
    content = bytearray(file.read_bytes())
    if chance.random() < 0.5:
        del content[chance.randrange(len(content)) :]
    else:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def leave(folder: Path, number: int, rank: int) -> None:
    """Start, and ask one rank to leave."""
    before = steps_done(folder)
    with start(folder) as ranks:
        ranks.until(lambda: steps_done(folder) > before or not ranks.running)
        if ranks.processes[rank].is_alive():
            ranks.signal(number, rank)
        assert set(ranks.statuses()) <= {EXIT_TRY_AGAIN, 0}, ranks.printed


@pytest.mark.parametrize(("number", "rank"), [*slow([(signal.SIGTERM, 1)]), *soak([(signal.SIGUSR1, 0)])])
def test_a_signal_to_any_rank_saves_and_ends_all(
    tmp_path: Path, undisturbed: Path, number: int, rank: int
) -> None:
    with start(tmp_path, "checkpoint.every_steps=1000") as ranks:
        ranks.until(lambda: steps_done(tmp_path) >= 3)
        ranks.signal(number, rank)
        ranks.signal(number, rank)  # a second one is no reason to leave without saving
        assert ranks.statuses() == [EXIT_TRY_AGAIN, EXIT_TRY_AGAIN], ranks.printed
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert f"stopped after step {int(saved.name[5:])};" in ranks.printed
    assert 3 <= int(saved.name[5:]) == steps_done(tmp_path)
    assert not (tmp_path / "run" / "result.json").exists()
    finish(tmp_path)
    assert_same_run(tmp_path, undisturbed, STEPS)


@pytest.mark.slow
def test_touched_files_save_and_stop(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with start(
        tmp_path, "checkpoint.every_steps=100000", "train.max_steps=100000", "train.epochs=9999"
    ) as ranks:
        ranks.until(lambda: steps_done(tmp_path) >= 2)
        (folder / "save-now").touch()
        ranks.until(lambda: any(folder.glob("checkpoints/step-*")))
        saved_at = int(next(folder.glob("checkpoints/step-*")).name[5:])
        ranks.until(lambda: steps_done(tmp_path) > saved_at + 2)
        assert not (folder / "save-now").exists()
        (folder / "stop-now").touch()
        assert ranks.statuses() == [0, 0], ranks.printed
    assert not (folder / "stop-now").exists()
    newest = newest_checkpoint(folder)
    assert newest is not None and int(newest.name[5:]) == steps_done(tmp_path) > saved_at
    assert "the same command goes on from there" in ranks.printed


@pytest.mark.slow
def test_a_second_start_in_the_folder_is_refused_and_the_first_is_undisturbed(
    tmp_path: Path, undisturbed: Path
) -> None:
    with start(tmp_path, SLURM_JOB_ID="17") as first:
        first.until(lambda: steps_done(tmp_path) >= 2)
        with Ranks(arguments(tmp_path), 2, tmp_path / "second", None, {"SLURM_JOB_ID": "18"}) as second:
            assert second.statuses() == [EXIT_USAGE, EXIT_USAGE], second.printed
        (line,) = second.printed.splitlines()
        who = f"process {first.processes[0].pid} on {socket.gethostname()}, Slurm job 17, since "
        assert f"error: rank 0: {tmp_path / 'run'}: is the folder of a run that is going on: {who}" in line
        assert first.statuses() == [0, 0], first.printed
    assert_same_run(tmp_path, undisturbed, STEPS)


@pytest.mark.slow
def test_a_start_on_a_lost_node_that_lives_on_ends_and_writes_nothing(
    tmp_path: Path, undisturbed: Path
) -> None:
    """Frozen in mid-run, as Slurm gives it up; when it goes on, the job's next start has made further steps."""
    job = {"SLURM_JOB_ID": "4711", "SLURM_RESTART_COUNT": "0"}
    with Ranks(arguments(tmp_path), 2, tmp_path / "lost", None, job) as lost:
        lost.until(lambda: steps_done(tmp_path) >= 5)
        for rank in (0, 1):
            lost.signal(signal.SIGSTOP, rank)
        with start(tmp_path, SLURM_JOB_ID="4711", SLURM_RESTART_COUNT="1") as ranks:
            before = steps_done(tmp_path)
            ranks.until(lambda: steps_done(tmp_path) > before)
            for rank in (0, 1):
                lost.signal(signal.SIGCONT, rank)
            assert lost.statuses() == [EXIT_USAGE, EXIT_USAGE], lost.printed
            assert ranks.statuses() == [0, 0], ranks.printed
    assert f"error: {tmp_path / 'run'}: start 2 of this run has taken over" in lost.printed
    assert "rank 1: rank 0 stopped with an error" in lost.printed
    assert_same_run(tmp_path, undisturbed, STEPS)
    assert not list(tmp_path.glob("run/checkpoints/.*"))


def fill_disk(ranks: Ranks, folder: Path) -> tuple[int, tuple[int, int]]:
    """Let no file of rank 0 grow beyond what the log has now, which is more than ranks print; process, old limits."""
    pid = ranks.processes[0].pid
    assert pid is not None
    limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    size = (folder / "run" / "metrics.jsonl").stat().st_size
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, limits[1]))
    return pid, limits


@pytest.mark.slow
def test_a_rank_that_dies_while_it_writes_its_share_costs_the_steps_since(
    tmp_path: Path, pool: PoolOf
) -> None:
    """A share of two ranks is four renames on each: two files, and two with their sums. It dies at the sixth."""
    short = ("engine=fsdp", "train.max_steps=8")
    with start(tmp_path / "straight", *short) as ranks:
        assert ranks.statuses() == [0, 0], ranks.printed
    trouble = Trouble(1, "kill", event="os.rename", path=".partial", count=6)
    with start(tmp_path / "killed", *short, trouble=trouble) as ranks:
        assert ranks.statuses() == [EXIT_TRY_AGAIN, -signal.SIGKILL], ranks.printed
    newest = newest_checkpoint(tmp_path / "killed" / "run")
    assert newest is not None and newest.name == "step-00000002"
    finish(tmp_path / "killed", *short)
    assert_same_run(tmp_path / "killed", tmp_path / "straight", 8)
    assert not half_written(tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 1)])
def test_a_killed_run_goes_on_on_other_ranks_as_one_that_was_stopped(
    tmp_path: Path, pool: PoolOf, before: int, after: int
) -> None:
    trouble = Trouble(1, "kill", event="os.rename", path=".partial", count=6)
    stopped, killed = tmp_path / "stopped", tmp_path / "killed"
    with start(stopped, "engine=fsdp", "train.max_steps=2", world=before) as ranks:
        assert ranks.statuses() == [0] * before, ranks.printed
    with start(killed, "engine=fsdp", "train.max_steps=8", world=before, trouble=trouble) as ranks:
        assert ranks.statuses()[1] == -signal.SIGKILL, ranks.printed
    newest = newest_checkpoint(killed / "run")
    assert newest is not None and newest.name == "step-00000002"
    for folder in (stopped, killed):
        with start(folder, "engine=fsdp", "train.max_steps=8", world=after) as ranks:
            assert ranks.statuses() == [0] * after, ranks.printed
    assert_same_run(killed, stopped, 8)


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_costs_nothing(tmp_path: Path, undisturbed: Path) -> None:
    with start(tmp_path) as ranks:
        ranks.until(lambda: steps_done(tmp_path) >= 10)
        pid, limits = fill_disk(ranks, tmp_path)
        ranks.until(lambda: "its lines wait" in ranks.printed and "training goes on" in ranks.printed)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
        assert ranks.statuses() == [0, 0], ranks.printed
    assert_same_run(tmp_path, undisturbed, STEPS)


@pytest.mark.slow
def test_a_disk_that_stays_full_is_an_error_at_the_end(tmp_path: Path) -> None:
    with start(tmp_path, "train.max_steps=20", "checkpoint.every_steps=8") as ranks:
        ranks.until(lambda: steps_done(tmp_path) >= 10)
        fill_disk(ranks, tmp_path)
        assert ranks.statuses() == [EXIT_USAGE, EXIT_USAGE], ranks.printed
    newest = newest_checkpoint(tmp_path / "run")
    assert newest is not None and int(newest.name[5:]) in (8, 16)
    assert "step-00000020: can't be written" in ranks.printed


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["deepspeed", "fsdp"])
def test_a_poisoned_step_is_as_if_it_had_not_been(tmp_path: Path, undisturbed: Path, engine: str) -> None:
    poison = Trouble(1, "poison", at_step=4)
    keep = ("checkpoint.every_steps=1", "checkpoint.keep=20", f"engine={engine}", "train.max_steps=7")
    with start(tmp_path, "faults.nonfinite=skip", *keep, trouble=poison) as ranks:
        assert ranks.statuses() == [0, 0], ranks.printed
    before, after = weights(tmp_path, 4), weights(tmp_path, 5)
    assert all((after[name] == tensor).all() for name, tensor in before.items())
    assert losses(tmp_path)[4] == dict.fromkeys(losses(tmp_path)[4]), "null, not finite"
    following = weights(tmp_path, 6)
    assert any((following[name] != tensor).any() for name, tensor in before.items())
    assert json.loads((tmp_path / "run" / "result.json").read_text())["nonfinite_steps"] == 1
    if engine == "deepspeed":  # and looking for poison changes nothing
        assert losses(tmp_path)[:4] == losses(undisturbed)[:4]


@pytest.mark.slow
def test_too_much_poison_stops_the_run_with_a_line(tmp_path: Path) -> None:
    poison = Trouble(0, "poison", at_step=3)
    with start(tmp_path, trouble=poison) as ranks:
        assert ranks.statuses() == [EXIT_USAGE, EXIT_USAGE]
    assert "is nan at step 3: lower optim.lr=0.5" in ranks.printed
    assert ranks.printed.count("error: ") == 1
    lines = ("faults.nonfinite=skip", "faults.nonfinite_limit=1", "optim.lr=1e30", "optim.warmup_epochs=0")
    with start(tmp_path / "diverged", *lines) as ranks:
        assert ranks.statuses() == [EXIT_USAGE, EXIT_USAGE], ranks.printed
    assert "is the 2th with a loss or gradient that is not finite" in ranks.printed


@pytest.mark.parametrize("kind", [*soak(["sleep"]), *slow(["lock"])])
def test_a_rank_that_hangs_is_told_from_those_that_wait(tmp_path: Path, kind: str) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    patience = ("faults.hang_seconds=15", "engine=ddp")  # DeepSpeed may take longer to import
    with start(tmp_path, *patience, trouble=Trouble(1, kind, 3, path=str(lock))) as ranks:
        assert ranks.statuses() == [EXIT_TRY_AGAIN, EXIT_TRY_AGAIN], ranks.printed
    waiting, hanging = ((tmp_path / "run" / f"hang-rank0000{rank}.txt").read_text() for rank in (0, 1))
    first = hanging.splitlines()[0]
    assert "no step for 15 s after step 3" in first and first in ranks.printed
    if kind == "sleep":
        assert "in recorded_batch" not in waiting and "in <lambda> (support/ranks.py" in first
    else:
        assert f"waits for the lock {lock} of an extension's build" in first
    assert "loop.py" in waiting and "loop.py" in hanging, "the stacks"


@pytest.mark.slow
def test_a_run_moves_between_ranks_and_zero_stages(tmp_path: Path, pool: PoolOf, undisturbed: Path) -> None:
    for ranks, stage, last in [(2, 1, 2), (1, 2, 4), (4, 0, 6)]:
        argv = arguments(tmp_path, f"zero_stage={stage}", f"train.max_steps={last}")
        assert set(pool(ranks).run(run, argv)) == {""}
    for ours, theirs in zip(losses(tmp_path), losses(undisturbed)[:6], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["train.accumulation=2"],
            "losses contrast 64 images there (2 ranks, micro-batches: 1) and 32 here",
        ),
        (["network.sync_bn=false"], "BatchNorm averages over 64 images there"),
        (["train.batch_size=32"], "train.batch_size=32 must be 64"),
        (["seed=1"], "is of a run with seed=0, which sets the order of its images"),
    ],
)
def test_what_would_change_the_numbers_is_refused(
    tmp_path: Path, pool: PoolOf, overrides: list[str], message: str
) -> None:
    assert set(pool(2).run(run, arguments(tmp_path, "train.max_steps=2"))) == {""}
    changed = arguments(tmp_path, *overrides, "train.max_steps=4")
    (refusal,) = set(pool(2).run(run, changed))
    assert message in refusal and "\n" not in refusal


@pytest.mark.slow
def test_a_batch_norm_for_each_rank_keeps_its_images_by_accumulation(tmp_path: Path, pool: PoolOf) -> None:
    supervised = ("method.name=dgl", "network.sync_bn=false", "views.kind=cifar")
    assert set(pool(2).run(run, arguments(tmp_path, *supervised, "train.max_steps=2"))) == {""}
    (refusal,) = pool(1).run(run, arguments(tmp_path, *supervised, "train.max_steps=4"))
    assert refusal.endswith("set train.accumulation=2, with network.sync_bn=false as before")
    assert pool(1).run(
        run, arguments(tmp_path, *supervised, "train.max_steps=4", "train.accumulation=2")
    ) == [""]
