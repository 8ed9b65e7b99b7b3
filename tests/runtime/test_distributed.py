"""Launch variables, agreement on errors, and the gather that gradients flow through."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from framework.runtime import distributed
from framework.runtime.distributed import gather_with_gradient, rank, same_outcome, world_size
from framework.runtime.errors import UserError
from framework.runtime.launch import LAUNCH_VARIABLES, MPI_VARIABLES, launch_variables, launched_rank

PoolOf = Callable[[int], Any]

SLURM = {
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "alpha",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
}


def test_a_launchers_variables_are_taken_as_they_are() -> None:
    given = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
        "X": "y",
    }
    assert launch_variables({**SLURM, **given}) == {k: v for k, v in given.items() if k != "X"}


def test_an_incomplete_launch_names_what_is_missing() -> None:
    with pytest.raises(UserError, match="RANK is set but WORLD_SIZE is not"):
        launch_variables({"RANK": "0"})


def test_srun_tasks_become_ranks() -> None:
    values = launch_variables(SLURM)
    assert (values["RANK"], values["WORLD_SIZE"], values["LOCAL_RANK"]) == ("5", "8", "1")
    assert values["MASTER_ADDR"] == "alpha"
    assert launch_variables({**SLURM, "SLURM_PROCID": "0"})["MASTER_PORT"] == values["MASTER_PORT"]
    for name in ("SLURM_STEP_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_ID"):
        assert launch_variables({**SLURM, name: "1"})["MASTER_PORT"] != values["MASTER_PORT"]
    assert launch_variables({**SLURM, "MASTER_ADDR": "b"})["MASTER_ADDR"] == "b"


def test_a_plain_python_in_a_batch_script_is_alone() -> None:
    """There Slurm sets the job's task count and this process' rank 0, though no task was started."""
    values = launch_variables({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "4711"})
    assert (values["WORLD_SIZE"], values["MASTER_ADDR"]) == ("1", "127.0.0.1")


@pytest.fixture
def task() -> Iterator[Callable[..., str]]:
    """Starts what srun would start as a task, waiting for input; its SLURM_TASK_PID."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> str:
        process = subprocess.Popen(command, stdin=subprocess.PIPE)
        started.append(process)
        words = "\0".join(command).encode()
        while words not in Path(f"/proc/{process.pid}/cmdline").read_bytes():  # until exec is done
            time.sleep(0.01)
        return str(process.pid)

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_command_at_the_prompt_of_one_of_several_tasks_is_alone(
    task: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    """``srun --ntasks 8 --pty bash``: the other seven shells have ended, and nobody else would come."""
    for shell in (["bash"], ["sh", "-i"]):
        caplog.clear()
        values = launch_variables({**SLURM, "SLURM_TASK_PID": task(*shell)})
        assert (values["RANK"], values["WORLD_SIZE"], values["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")
        assert "alone: srun started 8 tasks" in caplog.text


def test_a_script_of_a_task_is_a_rank(task: Callable[..., str]) -> None:
    """Every task runs it, whatever starts it and under whatever program."""
    for command in (["bash", "-c", "read; python train.py"], ["cat", "-"]):
        values = launch_variables({**SLURM, "SLURM_TASK_PID": task(*command)})
        assert (values["RANK"], values["WORLD_SIZE"]) == ("5", "8")
    assert launch_variables({**SLURM, "SLURM_TASK_PID": str(2**30)})["RANK"] == "5"  # of another name space


ADDRESS = {"MASTER_ADDR": "alpha", "MASTER_PORT": "29500"}
MPI = [dict(zip(names, ("3", "4", "1"), strict=True)) for names in MPI_VARIABLES]


@pytest.mark.parametrize("variables", MPI, ids=lambda v: next(iter(v)))
def test_mpirun_says_who_is_who_and_not_where(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = launch_variables({**variables, **ADDRESS})
    assert [values[name] for name in LAUNCH_VARIABLES] == ["3", "4", "1", "alpha", "29500"]
    with pytest.raises(UserError, match=r"mpirun has set \w+ and \w+, but MASTER_ADDR is not set") as caught:
        launch_variables(variables)
    assert "\n" not in str(caught.value)
    # A multi-node mpirun starts its helpers by srun, one a node.
    helper = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    assert launch_variables({**SLURM, **helper, **variables, **ADDRESS})["RANK"] == "3"
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched_rank() == 3  # which does not repeat what rank 0 says


def test_srun_may_set_the_variables_of_pmi_too() -> None:
    values = launch_variables({**SLURM, "PMI_RANK": "5", "PMI_SIZE": "8"})
    assert (values["RANK"], values["WORLD_SIZE"], values["MASTER_ADDR"]) == ("5", "8", "alpha")
    alone = launch_variables({"PMI_RANK": "0", "PMI_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"})
    assert alone["WORLD_SIZE"] == "1"


def test_without_start_there_is_one_rank() -> None:
    x = torch.ones(2, 3)
    assert (rank(), world_size(), distributed.is_main()) == (0, 1, True)
    assert gather_with_gradient(x) is x
    assert distributed.from_main([1, None, "ö"]) == [1, None, "ö"]


def everyones_rows() -> Tensor:
    return torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def gathered_loss(rows: Tensor, everyone: Tensor, first: int) -> Tensor:
    """A loss of this rank's rows against all rows, in which every pair counts differently."""
    weights = torch.arange(1.0, 1 + len(everyone), dtype=torch.float64)
    return ((rows @ everyone.T).exp() * weights * (first + 1)).mean()


def gather_and_backward() -> tuple[Tensor, Tensor]:
    """Gathered rows, and the gradient of the mean loss over ranks with respect to this rank's rows."""
    rows = everyones_rows().flatten(0, 1).chunk(world_size())[rank()].clone().requires_grad_()
    everyone = gather_with_gradient(rows)
    (gathered_loss(rows, everyone, rank()) / world_size()).backward()
    return everyone.detach(), rows.grad


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_gather_equals_one_process_in_values_and_gradients(pool: PoolOf, ranks: int) -> None:
    results = pool(ranks).run(gather_and_backward)
    rows = everyones_rows().flatten(0, 1).requires_grad_()
    parts = rows.chunk(ranks)
    sum(gathered_loss(part, rows, r) / ranks for r, part in enumerate(parts)).backward()
    for everyone, _ in results:
        assert torch.equal(everyone, rows.detach())
    torch.testing.assert_close(
        torch.cat([gradient for _, gradient in results]), rows.grad, rtol=1e-13, atol=0
    )


def fail(messages: dict[int, str], kind: type[Exception]) -> str:
    try:
        with same_outcome():
            if rank() in messages:
                raise kind(messages[rank()])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "fine"


def test_all_ranks_leave_with_the_same_outcome(pool: PoolOf) -> None:
    four = pool(4)
    assert four.run(fail, {}, UserError) == ["fine"] * 4
    assert four.run(fail, dict.fromkeys(range(4), "no shards"), UserError) == ["UserError: no shards"] * 4
    alone = four.run(fail, {2: "no shards"}, UserError)
    assert alone == ["UserError: rank 2: no shards"] * 4
    differing = four.run(fail, {0: "a", 1: "b", 3: "a"}, UserError)
    assert differing == ["UserError: rank 0,3: a\nrank 1: b"] * 4
    bug = four.run(fail, {1: "x"}, KeyError)
    assert bug[1] == "KeyError: 'x'" and set(bug[:1] + bug[2:]) == {"UserError: rank 1: KeyError: 'x'"}


def exchange() -> tuple[list[str], object, list[float]]:
    mean = distributed.mean_over_ranks(torch.tensor([float(rank()), 1.0]))
    return distributed.gather_text("ü" * rank()), distributed.from_main({"rank": rank()}), mean.tolist()


def test_texts_values_and_means(pool: PoolOf) -> None:
    assert pool(4).run(exchange) == [(["", "ü", "üü", "üüü"], {"rank": 0}, [1.5, 1.0])] * 4
