"""Ports for those who can't say 0 and be told which one they got."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """A port of this machine that nobody has, below those that the kernel gives away by itself."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
