"""Jobs on a real Slurm cluster of two nodes: submitted, out of time, preempted, cut off from a node, canceled."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from framework.runtime.errors import UserError
from framework.runtime.run_lock import take
from framework.tracking.metric_log import read_log
from tests.support import slurm_cluster
from tests.support.held import hold
from tests.support.holder import Start
from tests.support.pool import Pool
from tests.support.runs import ROOT, assert_same_run, losses, run, starts, toy
from tests.support.slurm_cluster import Cluster, until

OPTIONS = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=2")
LENGTH = ["train.epochs=1000", "checkpoint.every_steps=20"]
PATIENCE = 900.0  # seconds; a start takes some 20 on two quiet cores, and a requeued job waits for 10

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(slurm_cluster.missing() is not None, reason=slurm_cluster.missing() or ""),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes. In a folder of its own, since the path of a socket must be short."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        cluster = Cluster(Path(folder))
        yield cluster
        cluster.close()


class Reference(NamedTuple):
    """The same run on two ranks without Slurm, of ``steps`` steps."""

    folder: Path
    steps: int


def reference(pool: Callable[[int], Pool], folder: Path, steps: int) -> None:
    """Train to that step on two ranks without Slurm."""
    argv = [str(ROOT / "recipes" / "loco_r50_800ep.yaml"), *LENGTH]
    more = toy(folder, "data.workers=0", f"train.max_steps={steps}")
    assert pool(2).run(run, [*argv, *more], timeout=PATIENCE) == ["", ""]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, pool: Callable[[int], Pool]) -> Reference:
    """A run of some twenty seconds, in as many steps as this machine takes in that time."""
    folder = tmp_path_factory.getbasetemp() / "undisturbed"
    reference(pool, folder, 40)
    per_second = read_log(folder / "run" / "metrics.jsonl")[-1]["images_per_second"] / 64
    steps = math.ceil(20 * per_second) + 60
    reference(pool, folder, steps)
    return Reference(folder, steps)


class Job:
    """``slurm/loco_800ep.sh`` at toy size on both nodes, its run in ``folder / "run"``."""

    def __init__(
        self, cluster: Cluster, folder: Path, steps: int, *overrides: str, options: tuple[str, ...] = ()
    ) -> None:
        self.cluster, self.folder = cluster, folder
        folder.mkdir(exist_ok=True)
        more = (*OPTIONS, "--time=30", f"--output={folder}/job-%j.log", *options)
        # No name server knows the nodes.
        variables = {"MASTER_ADDR": "127.0.0.1", "TMPDIR": str(folder), "PAUSE": "1"}
        arguments = toy(folder, *LENGTH, f"train.max_steps={steps}", *overrides)
        self.id = cluster.submit("slurm/loco_800ep.sh", *arguments, options=more, **variables)
        self.log = folder / f"job-{self.id}.log"

    @property
    def state(self) -> str:
        """Such as ``RUNNING``."""
        return self.cluster.job(self.id)["JobState"]

    @property
    def restarts(self) -> int:
        """How often Slurm has started it again."""
        return int(self.cluster.job(self.id)["Restarts"])

    def until_checkpoint(self) -> None:
        """Wait until it has saved at least once and trains on."""
        until(
            lambda: any(self.folder.glob("run/checkpoints/step-*")), PATIENCE, f"no checkpoint:\n{self.text}"
        )

    def until_done(self) -> None:
        """Wait for the end, which must be a good one."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        until(lambda: self.state in ended and not self.cluster.processes(self.id), PATIENCE, "not done")
        assert self.state == "COMPLETED", self.text

    @property
    def text(self) -> str:
        """What it printed so far."""
        return self.log.read_text() if self.log.exists() else ""


def test_a_job_over_two_nodes_is_the_same_run(
    cluster: Cluster, tmp_path: Path, undisturbed: Reference
) -> None:
    job = Job(cluster, tmp_path, undisturbed.steps)
    job.until_done()
    assert_same_run(tmp_path, *undisturbed)
    assert (job.restarts, starts(tmp_path)) == (0, 1)
    assert (tmp_path / "run" / "result.json").exists()


# Nobody listens to URG, so that the first the ranks hear is the limit's TERM.
@pytest.mark.parametrize(
    ("signaled", "cause"),
    [("USR1@15", "JobState=RUNNING"), ("URG@1", "Reason=TimeLimit")],
    ids=["warned", "not warned"],
)
def test_a_job_that_runs_out_of_time_goes_on(
    cluster: Cluster,
    tmp_path: Path,
    undisturbed: Reference,
    pool: Callable[[int], Pool],
    signaled: str,
    cause: str,
) -> None:
    """How many steps fit into the limit is the machine's affair, so somebody stops the run after its restart."""
    job = Job(cluster, tmp_path, 10**6, options=("--time=2", f"--signal={signaled}"))
    until(lambda: job.restarts and starts(tmp_path) > 1, PATIENCE, "not started again")
    before = len(losses(tmp_path))
    until(
        lambda: len(losses(tmp_path)) > max(before, undisturbed.steps), PATIENCE, "no step after the restart"
    )
    (tmp_path / "run" / "stop-now").touch()
    job.until_done()
    assert re.search(rf"ended with status 75, .*{cause}", job.text), job.text
    steps = len(losses(tmp_path))
    shutil.copytree(undisturbed.folder, tmp_path / "whole")
    reference(pool, tmp_path / "whole", steps)
    assert_same_run(tmp_path, tmp_path / "whole", steps)


def preempt(cluster: Cluster, folder: Path) -> None:
    """Submit a job that takes both nodes from those of lower partitions."""
    (folder / "urgent.sh").write_text("#!/bin/bash\nsleep 1\n")
    options = ("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null")
    cluster.submit(str(folder / "urgent.sh"), options=options)


def test_a_preempted_job_saves_and_comes_back(
    cluster: Cluster, tmp_path: Path, undisturbed: Reference
) -> None:
    job = Job(cluster, tmp_path, undisturbed.steps)
    job.until_checkpoint()
    preempt(cluster, tmp_path)
    until(lambda: job.restarts == 1, 60, "not preempted")
    until(lambda: "stopped after step" in job.text, 60, "did not save")
    job.until_done()
    assert_same_run(tmp_path, *undisturbed)
    assert starts(tmp_path) == 2


def test_a_job_that_preemption_cancels_comes_back(
    cluster: Cluster, tmp_path: Path, undisturbed: Reference
) -> None:
    """By PreemptMode=CANCEL, which Slurm does not take back by itself."""
    job = Job(cluster, tmp_path, undisturbed.steps, options=("--partition=canceled",))
    job.until_checkpoint()
    preempt(cluster, tmp_path)
    until(lambda: job.restarts == 1, 60, "not started again")
    assert re.search("ended with status 75, JobState=COMPLETING Reason=None .* PreemptTime=2", job.text)
    job.until_done()
    assert_same_run(tmp_path, *undisturbed)
    assert starts(tmp_path) == 2


def test_a_rank_that_outlives_the_time_limit_costs_no_more_than_that(
    cluster: Cluster, tmp_path: Path, undisturbed: Reference
) -> None:
    """It hears nothing, and the other one waits for it; their script hears the limit, too, and must not wait."""
    job = Job(cluster, tmp_path, undisturbed.steps, options=("--signal=URG@1",))
    job.until_checkpoint()
    (held,) = (pid for pid in cluster.processes(job.id, "n2") if rank_of(pid) == 1)
    hold(held)
    cluster.ask("scontrol", "update", f"jobid={job.id}", "timelimit=1")
    until(lambda: job.restarts == 1, 180, "not started again")
    assert "a rank does not end" in job.text, job.text
    assert re.search("ended with status 75, .* Reason=TimeLimit", job.text), job.text
    cluster.ask("scontrol", "update", f"jobid={job.id}", "timelimit=30")
    job.until_done()
    assert_same_run(tmp_path, *undisturbed)


def test_linear_evaluation_is_a_job_too(cluster: Cluster, tmp_path: Path, undisturbed: Reference) -> None:
    """On two nodes it finds what the command finds without Slurm on one rank."""
    command = ["--cached", "--epochs", "120", "--batch-size", "64", "--lr", "1"]  # until both have converged
    shutil.copytree(undisturbed.folder / "run", tmp_path / "run")
    log = tmp_path / "job.log"
    variables = {"MASTER_ADDR": "127.0.0.1", "TMPDIR": str(tmp_path)}
    more = (*OPTIONS, "--time=30", f"--output={log}")
    job = cluster.submit("slurm/linear_eval.sh", str(tmp_path / "run"), *command, options=more, **variables)
    until(lambda: cluster.job(job)["JobState"] == "COMPLETED", PATIENCE, "not done")
    result = tmp_path / "run" / "analysis" / "linear_eval_loco_cached.json"
    ours = json.loads(result.read_text())
    result.unlink()
    tool = [sys.executable, str(ROOT / "tools" / "linear_eval.py"), str(tmp_path / "run"), *command]
    subprocess.run(tool, check=True, capture_output=True)
    theirs = json.loads(result.read_text())
    assert (ours["ranks"], theirs["ranks"]) == (2, 1)
    assert ours["top1"] == pytest.approx(theirs["top1"], abs=2)


@pytest.mark.parametrize("fate", ["set down", "lost"])
def test_a_job_outlives_a_node(cluster: Cluster, tmp_path: Path, undisturbed: Reference, fate: str) -> None:
    job = Job(cluster, tmp_path, undisturbed.steps)
    job.until_checkpoint()
    if fate == "lost":
        cluster.lose_node("n2")
    else:
        cluster.ask("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    until(lambda: job.restarts == 1, 120, "not started again")
    if fate == "lost":
        cluster.start_node("n2")
    else:
        until(lambda: cluster.resume("n2"), 120, "n2 stays down")
    job.until_done()
    assert_same_run(tmp_path, *undisturbed)


def test_the_next_job_of_a_chain_takes_the_folder_of_one_that_slurm_has_ended(
    cluster: Cluster, tmp_path: Path, pool: Callable[[int], Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that lives on, as on a lost node, learns of it; while its job runs, the folder is refused."""
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    first, second = (sleeping(cluster, tmp_path) for _ in range(2))
    with Start(tmp_path / "run", SLURM_JOB_ID=first, SLURM_CLUSTER_NAME="test") as start:
        monkeypatch.setenv("SLURM_JOB_ID", second)
        monkeypatch.setenv("SLURM_CLUSTER_NAME", "test")
        with pytest.raises(UserError, match=f"is going on: .* Slurm job test/{first}, since"):
            take(tmp_path / "run")
        cluster.ask("scancel", first)
        until(lambda: cluster.job(first)["JobState"] == "CANCELLED", 60, "not canceled")
        monkeypatch.setenv("SLURM_CLUSTER_NAME", "another")
        with pytest.raises(UserError, match="is going on"):
            take(tmp_path / "run")
        monkeypatch.setenv("SLURM_CLUSTER_NAME", "test")
        lock = take(tmp_path / "run")
        assert "start 2 of this run has taken over from this one" in start.writes()
        start.ends()
        lock.check()
        lock.release()


def sleeping(cluster: Cluster, folder: Path) -> str:
    """A job that runs and does nothing."""
    script = folder / "sleep.sh"
    script.write_text("#!/bin/bash\nsleep 600\n")
    job = cluster.submit(str(script), options=(f"--output={folder}/%j.log",))
    until(lambda: cluster.job(job)["JobState"] == "RUNNING", 60, "not started")
    return job


def test_a_rank_that_hangs_is_reported_and_the_job_goes_on(
    cluster: Cluster, tmp_path: Path, undisturbed: Reference
) -> None:
    job = Job(cluster, tmp_path, undisturbed.steps, "faults.hang_seconds=15")
    job.until_checkpoint()
    (frozen,) = (pid for pid in cluster.processes(job.id, "n2") if rank_of(pid) == 1)
    os.kill(frozen, signal.SIGSTOP)
    until(lambda: job.restarts == 1, 120, "not started again")
    report = (tmp_path / "run" / "hang-rank00000.txt").read_text()
    assert "rank 0 on" in report and "no step for 15 s after step" in report and "loop.py" in report
    job.until_done()
    assert_same_run(tmp_path, *undisturbed)


def test_a_crash_is_started_again_and_a_mistake_is_not(
    cluster: Cluster, tmp_path: Path, undisturbed: Reference
) -> None:
    job = Job(cluster, tmp_path, undisturbed.steps)
    job.until_checkpoint()
    (victim,) = (pid for pid in cluster.processes(job.id, "n1") if rank_of(pid) == 0)
    os.kill(victim, signal.SIGKILL)
    job.until_done()
    assert job.restarts == 1
    assert_same_run(tmp_path, *undisturbed)
    wrong = Job(cluster, tmp_path, undisturbed.steps, "optim.name=sgd")
    until(lambda: wrong.state == "FAILED", PATIENCE, "not ended")
    assert wrong.restarts == 0
    (line,) = (line for line in wrong.text.splitlines() if line.startswith("error: "))
    assert "optimizer is LARS, and optim.name asks for SGD" in line


def test_a_job_that_comes_to_nothing_is_given_up(cluster: Cluster, tmp_path: Path) -> None:
    """A server that does not answer may do so at the next start, but not for ever."""
    job = Job(cluster, tmp_path, 10, "data.prepare=none", "data.path=http://127.0.0.1:9/images")
    until(lambda: job.state == "FAILED", PATIENCE, "not ended")
    assert job.restarts == 2 and job.text.count("ended with status 75, JobState=RUNNING") == 3
    assert "127.0.0.1:9/images" in job.text and "cannot be read" in job.text
    assert "3 starts in a row left no new checkpoint: not started again" in job.text


def test_nothing_survives_scancel_but_the_checkpoint(
    cluster: Cluster, tmp_path: Path, undisturbed: Reference
) -> None:
    job = Job(cluster, tmp_path, undisturbed.steps, "data.workers=2")
    job.until_checkpoint()
    assert len(cluster.processes(job.id)) >= 2 * 3, "two ranks with two workers each"
    step = cluster.ask("scontrol", "show", "step", f"{job.id}.0")
    assert re.search("TresPerTask=cpu[:=]2", step), "a rank may use the CPUs that the job asked for"
    cluster.ask("scancel", job.id)
    until(lambda: not cluster.processes(job.id), 30, "processes survived")
    until(lambda: job.state == "CANCELLED", 60, "not canceled")
    assert job.restarts == 0
    saved = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert "stopped after step" in job.text and (saved[-1] / "manifest.json").exists()


def rank_of(pid: int) -> int | None:
    """Rank of a training process, ``None`` of any other."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    of_train = b"framework/train.py" in words and b"python" in words[0]
    workers_parent = b"framework/train.py" in Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")
    if not of_train or (workers_parent and b"python" in Path(f"/proc/{parent}/cmdline").read_bytes()):
        return None
    return next(int(v.split(b"=")[1]) for v in environment if v.startswith(b"SLURM_PROCID="))
