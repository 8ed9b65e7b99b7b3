"""What Slurm knows of jobs, asked by its own command."""

from __future__ import annotations

import subprocess

#: states after which Slurm runs nothing of a job any more, as far as it knows
_ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
)


def has_ended(number: str) -> bool:
    """Whether Slurm counts a job of this cluster as over.

    A lost node may still run it. Some minutes after its end Slurm forgets a job.

    Args:
        number: ``SLURM_JOB_ID``.

    Returns:
        ``False`` also if nobody can say: a container has no ``scontrol``.
    """
    command = ["scontrol", "show", "job", "--oneliner", number]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    if done.returncode:
        return "Invalid job id" in done.stderr
    words = dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)
    return words.get("JobState") in _ENDED
