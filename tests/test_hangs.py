"""The watchdog in a process of its own; in training it is part of the tests of faults."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from framework.control import GO_ON_LATER

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


def test_a_score_may_take_longer_than_a_step(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-c", SCORES_THEN_HANGS, str(tmp_path)], capture_output=True, text=True
    )
    assert (found.returncode, found.stdout) == (GO_ON_LATER, "scored\n")
    assert "no step for 0.5 s after step 7" in found.stderr
