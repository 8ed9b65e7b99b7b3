"""The watchdog in a process of its own; in training it is part of the tests of faults."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from framework.runtime.exit_status import EXIT_TRY_AGAIN

SCORES_THEN_HANGS = """
import sys, time
from pathlib import Path
from framework.hangs import Watchdog

with Watchdog(Path(sys.argv[1]), 0.5) as watchdog:
    watchdog.step(7)
    with watchdog.asleep():
        time.sleep(2)
    print("scored", flush=True)
    time.sleep(60)
"""

IS_SUSPENDED = """
import os, signal, sys, time
from pathlib import Path
from framework.hangs import Watchdog

with Watchdog(Path(sys.argv[1]), 2.0) as watchdog:
    if not os.fork():
        os.kill(os.getppid(), signal.SIGSTOP)
        time.sleep(4)
        os.kill(os.getppid(), signal.SIGCONT)
        os._exit(0)
    for step in range(10):
        watchdog.step(step)
        time.sleep(0.1)
"""


def test_who_is_suspended_does_not_hang(tmp_path: Path) -> None:
    command = [sys.executable, "-c", IS_SUSPENDED, str(tmp_path)]
    before = time.monotonic()
    found = subprocess.run(command, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")
    assert time.monotonic() - before > 4


def test_a_score_may_take_longer_than_a_step(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-c", SCORES_THEN_HANGS, str(tmp_path)], capture_output=True, text=True
    )
    assert (found.returncode, found.stdout) == (EXIT_TRY_AGAIN, "scored\n")
    assert "no step for 0.5 s after step 7" in found.stderr
