"""Two hosts on this machine: network namespaces joined by a cable that can be cut, with this machine's files."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
from functools import partial
from pathlib import Path

from tests.support.ranks import Ranks, Trouble

CLONE_NEWUTS, CLONE_NEWNET = 0x4000000, 0x40000000
ADDRESSES = ("10.213.7.1", "10.213.7.2")


def missing() -> str | None:
    """Why there can be no two hosts here; ``None`` if there can."""
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    if shutil.which("ip") is None:
        return "ip not found: apt-get install iproute2"
    done = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True)
    return done.stderr.strip() if done.returncode else None


class TwoHosts:
    """To be used with ``with``. Rank 0 is on ``near``, rank 1 on ``far``."""

    def __init__(self) -> None:
        self.names = [f"stagewise-{os.getpid()}-{name}" for name in ("near", "far")]

    def __enter__(self) -> TwoHosts:
        near, far = self.names
        for name in self.names:
            _ip("netns", "add", name)
        _ip("-n", near, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", far)
        for name, address in zip(self.names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", "eth0", "up")
        return self

    def __exit__(self, *exception: object) -> None:
        for name in self.names:
            _ip("netns", "delete", name)

    def ranks(
        self, argv: list[str], record: Path, trouble: Trouble | None = None, cut_after: str = ""
    ) -> Ranks:
        """A start of a recipe on both; the cable is cut when rank 1 returns from that function of ``joining``."""
        variables = {"MASTER_ADDR": ADDRESSES[0], "GLOO_SOCKET_IFNAME": "eth0"}
        return Ranks(argv, 2, record, trouble, variables, partial(_enter, self.names, cut_after))

    def cut(self) -> None:
        """Nothing gets through any more, and nobody is told."""
        cut(self.names)

    def mend(self) -> None:
        """As it was."""
        _ip("-n", self.names[1], "link", "set", "eth0", "up")


def cut(names: list[str]) -> None:
    """As ``TwoHosts.cut``."""
    _ip("-n", names[1], "link", "set", "eth0", "down")


def _enter(names: list[str], cut_after: str, rank: int) -> None:
    from framework.runtime import joining

    libc = ctypes.CDLL(None, use_errno=True)
    with Path(f"/run/netns/{names[rank]}").open() as place:
        if libc.setns(place.fileno(), CLONE_NEWNET) or libc.unshare(CLONE_NEWUTS):
            raise OSError(ctypes.get_errno(), "setns")
    socket.sethostname(names[rank].rpartition("-")[2])
    if rank == 1 and cut_after:
        whole = getattr(joining, cut_after)

        def and_cut(*arguments: object) -> object:
            result = whole(*arguments)
            cut(names)
            return result

        setattr(joining, cut_after, and_cut)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
