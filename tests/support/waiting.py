"""Waiting for what another process does."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 600.0  # seconds; far more than anything takes, however busy the machine


def until(
    condition: Callable[[], bool], seconds: float = PATIENCE, otherwise: str = "nothing happened"
) -> None:
    """Wait until something is so.

    Raises:
        AssertionError: it did not become so in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{otherwise} in {seconds:g} s"
        time.sleep(0.02)
