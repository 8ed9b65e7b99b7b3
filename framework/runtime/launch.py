"""What the launcher tells a process about its place among the ranks. Without PyTorch."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

from framework.runtime.errors import UserError

logger = logging.getLogger(__name__)

LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SHELLS = ("bash", "csh", "dash", "fish", "ksh", "sh", "tcsh", "zsh")

# Rank, number of ranks and rank on the machine, as Open MPI, MPICH and Intel MPI, and MVAPICH set them.
MPI_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
)


def launched_rank() -> int:
    """Number that the launcher gave this process, known before ``start``."""
    names = ("RANK", *(names[0] for names in MPI_VARIABLES), "SLURM_PROCID")
    return int(next((os.environ[name] for name in names if os.environ.get(name)), 0))


def launch_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Values of ``LAUNCH_VARIABLES`` for this process.

    The deepspeed launcher and torchrun set all five. Under ``srun`` with one task per rank they follow from
    Slurm's variables, MASTER_ADDR and MASTER_PORT unless set; under ``mpirun`` those two must be set. Otherwise,
    and at the prompt of a shell that srun started, the process runs alone, on a free loopback port.

    Raises:
        UserError: RANK is set without the others, mpirun without MASTER_ADDR and MASTER_PORT, or the first node of
            a Slurm step can't be told.
    """
    if "RANK" in environment:
        if missing := [name for name in LAUNCH_VARIABLES if name not in environment]:
            raise UserError(
                f"RANK is set but {missing[0]} is not: start with deepspeed, torchrun or srun, or unset RANK"
            )
        return {name: environment[name] for name in LAUNCH_VARIABLES}
    if names := _mpi_names(environment):
        return _mpi_variables(environment, *names)
    # Only srun sets the step's variables. A plain python in a batch script sees SLURM_NTASKS of the
    # whole job and would wait for ranks that nobody starts.
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and not _at_a_prompt(environment):
        return _slurm_variables(environment)
    if tasks > 1:
        logger.warning(
            "this process runs alone: srun started %d tasks, but it was started at the prompt of a shell, which is one "
            "of them; for all, end the shell and give the command itself to srun, without --pty",
            tasks,
        )
    return dict(zip(LAUNCH_VARIABLES, ("0", "1", "0", "127.0.0.1", str(_free_port())), strict=True))


def _mpi_names(environment: Mapping[str, str]) -> tuple[str, str, str] | None:
    """The variables of the ``mpirun`` that started several processes, of which this is one.

    A multi-node mpirun starts its own helpers with srun, whose variables then say nothing about these processes;
    srun on its own may set PMI's, with the same numbers as Slurm's.
    """
    for names in MPI_VARIABLES:
        rank, size, _ = (environment.get(name) for name in names)
        slurm = environment.get("SLURM_PROCID"), environment.get("SLURM_STEP_NUM_TASKS")
        if rank is not None and size is not None and int(size) > 1 and (rank, size) != slurm:
            return names
    return None


def _mpi_variables(environment: Mapping[str, str], rank: str, size: str, local: str) -> dict[str, str]:
    if missing := [name for name in (local, "MASTER_ADDR", "MASTER_PORT") if name not in environment]:
        raise UserError(
            f"mpirun has set {rank} and {size}, but {missing[0]} is not set: start with torchrun, deepspeed or srun, "
            "or hand MASTER_ADDR (the first node) and MASTER_PORT (a free port there) to all ranks of mpirun"
        )
    values = (environment[rank], environment[size], environment[local])
    addresses = (environment["MASTER_ADDR"], environment["MASTER_PORT"])
    return dict(zip(LAUNCH_VARIABLES, (*values, *addresses), strict=True))


def _at_a_prompt(environment: Mapping[str, str]) -> bool:
    """Whether the task that srun started is an interactive shell, as under ``srun --pty bash``.

    srun starts as many shells as tasks, but only the first has the terminal; the others end at once.
    """
    try:
        command = Path(f"/proc/{environment.get('SLURM_TASK_PID')}/cmdline").read_text().split("\0")[:-1]
    except OSError:
        return False
    shell, *arguments = command or [""]
    # A login shell's name begins with a dash.
    return Path(shell.lstrip("-")).name in SHELLS and all(a in ("-i", "-l", "--login") for a in arguments)


def _slurm_variables(environment: Mapping[str, str]) -> dict[str, str]:
    address = environment.get("MASTER_ADDR") or _first_host(environment["SLURM_STEP_NODELIST"])
    # A pure function of job, start and step, so that all ranks agree, below the range of ephemeral ports. An earlier
    # start may live on on a node that was lost.
    names = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")
    job, start, step = (int(environment.get(name) or 0) for name in names)
    port = 20000 + (job + 101 * start + 4999 * step) % 12000
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": address,
        "MASTER_PORT": environment.get("MASTER_PORT") or str(port),
    }


def _first_host(nodes: str) -> str:
    """First name of a Slurm node list such as ``gpu[3-4,7],login1``."""
    if "[" not in nodes:
        return nodes.split(",")[0]
    try:
        names = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"scontrol can't expand {nodes} ({error}): set MASTER_ADDR to the first node"
        ) from error
    return names.stdout.split()[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
