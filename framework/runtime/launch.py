"""What the launcher tells a process about its place among the ranks."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Mapping

from framework.runtime.errors import UserError

LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def launched_rank() -> int:
    """Number that the launcher gave this process, known before ``start``."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def launch_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Values of ``LAUNCH_VARIABLES`` for this process.

    The deepspeed launcher and torchrun set all five. Under ``srun`` with one task per rank they follow from
    Slurm's variables, MASTER_ADDR and MASTER_PORT unless set. Otherwise the process runs alone, on a free
    loopback port.

    Raises:
        UserError: RANK is set without the others, or the first node of a Slurm step can't be told.
    """
    if "RANK" in environment:
        if missing := [name for name in LAUNCH_VARIABLES if name not in environment]:
            raise UserError(
                f"RANK is set but {missing[0]} is not: start with deepspeed, torchrun or srun, or unset RANK"
            )
        return {name: environment[name] for name in LAUNCH_VARIABLES}
    # Only srun sets the step's variables. A plain python in a batch script sees SLURM_NTASKS of the
    # whole job and would wait for ranks that nobody starts.
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return _slurm_variables(environment)
    return dict(zip(LAUNCH_VARIABLES, ("0", "1", "0", "127.0.0.1", str(_free_port())), strict=True))


def _slurm_variables(environment: Mapping[str, str]) -> dict[str, str]:
    address = environment.get("MASTER_ADDR") or _first_host(environment["SLURM_STEP_NODELIST"])
    # A pure function of job and step, so that all ranks agree, below the range of ephemeral ports.
    port = 20000 + (int(environment["SLURM_JOB_ID"]) + 4999 * int(environment["SLURM_STEP_ID"])) % 12000
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
