"""Ranks that don't come, and which GPU each takes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from framework.runtime.errors import UserError
from framework.runtime.exit_status import EXIT_TRY_AGAIN
from framework.runtime.joining import choose_gpus
from framework.runtime.launch import launch_variables

LONELY = """
from datetime import timedelta
from framework.runtime import joining
from framework.runtime.command import status
joining.SLOW = timedelta(seconds=1)
raise SystemExit(status(lambda: joining.start(4)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_nobody_joins_says_so_and_gives_up(rank: int) -> None:
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    place["MASTER_PORT"] = launch_variables({})["MASTER_PORT"]  # free
    done = subprocess.run(
        [sys.executable, "-c", LONELY],
        env={**os.environ, **place, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == EXIT_TRY_AGAIN, done.stderr
    assert f"rank {rank} on " in done.stderr and "still waits for all 2 ranks" in done.stderr
    error = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert f"rank {rank} of 2 can't meet the others at 127.0.0.1:{place['MASTER_PORT']}" in error
    assert rank == 1 or "(no sign of rank 1)" in error


def test_ranks_take_gpus_that_are_their_own() -> None:
    """Whether each sees all of its machine, or only its own, as under ``--gpus-per-task``."""
    assert choose_gpus([("x", i, ["a", "b"]) for i in (0, 1)]) == [0, 1]
    assert choose_gpus([("x", 0, ["a"]), ("x", 1, ["b"]), ("y", 0, ["c"]), ("y", 1, ["d"])]) == [0] * 4
    assert choose_gpus([("x", 0, ["a", "b"]), ("x", 1, ["c", "d"]), ("x", 2, ["e", "f"])]) == [0, 1, 0]
    with pytest.raises(UserError, match=r"ranks 0 and 2 on x would share a GPU, of which it shows them 2"):
        choose_gpus([("x", i, ["a", "b"]) for i in range(3)])
    with pytest.raises(UserError, match=r"start one process a GPU .*--gpus-per-task=1"):
        choose_gpus([("x", 0, ["a"]), ("x", 1, ["a"])])
