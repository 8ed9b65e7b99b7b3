"""Connections between ranks beside those of the training: who has ended, and whether anybody gets on.

A collective can't tell: gloo's error says only that a connection closed, NCCL's kernels wait for ever, and so does
anything over a link that was cut. Every rank has a connection to rank 0, over which a thread of each sends a message
every second, whatever the others do. When a process ends, its kernel closes the connection; when its machine is
gone, nothing acknowledges the messages.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import select
import socket
import threading
import time
from contextlib import suppress
from enum import StrEnum
from multiprocessing.connection import Connection, wait

import torch.distributed as dist

logger = logging.getLogger(__name__)

BEAT = 1.0  # seconds between two messages
KEY = 16  # bytes by which ranks know each other


class End(StrEnum):
    """How a rank ended: ``LEFT`` for reasons that the others know, ``GONE`` without a word."""

    LEFT = "left"
    MISTAKE = "mistake"
    TRANSIENT = "transient error"
    GONE = "gone"


class Peers:
    """The other ranks, as this one hears of them.

    Attributes:
        rank: of this process.
        hosts: names of machines by rank; known after ``meet``.
        ends: how ranks ended, by rank.
        signs: how often this rank got on, which the others are told.
    """

    def __init__(self, rank: int, connections: dict[int, Connection], hosts: list[str]) -> None:
        self.rank, self.hosts = rank, hosts
        self.ends: dict[int, End] = {}
        self.signs = 0
        self._heard: dict[int, int] = {}
        self._connections = connections
        self._sending, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._listen, name="peers", daemon=True)
        self._thread.start()

    @property
    def heard(self) -> int:
        """A number that grows while any rank gets on."""
        return sum(self._heard.values())

    def leave(self, end: End) -> None:
        """Say how this rank ends, and close the connections."""
        self.ends[self.rank] = end
        self._send()
        self._over.set()
        self._thread.join()
        for connection in self._connections.values():
            connection.close()

    def _listen(self) -> None:
        due = 0.0
        while not self._over.is_set():
            open_ones = {c: r for r, c in list(self._connections.items()) if self.ends.get(r) is not End.GONE}
            if not open_ones:
                self._over.wait(BEAT)
                continue
            before = dict(self.ends)
            for connection in wait(list(open_ones), max(0.0, min(due - time.monotonic(), BEAT))):
                assert isinstance(connection, Connection)
                self._hear(open_ones[connection], connection)
            if time.monotonic() >= due or self.ends != before:
                self._send()
                due = time.monotonic() + BEAT

    def _hear(self, rank: int, connection: Connection) -> None:
        try:
            message = json.loads(connection.recv_bytes())
        except (OSError, EOFError):  # closed, or unacknowledged for too long
            if self.ends.setdefault(rank, End.GONE) is not End.GONE:
                self._connections.pop(rank)
            return
        self._heard[rank] = message["signs"]
        for other, end in message["ends"].items():
            self.ends.setdefault(int(other), End(end))

    def _send(self) -> None:
        """Rank 0 tells what it knows of all."""
        signs = self.signs + (self.heard if self.rank == 0 else 0)
        text = json.dumps({"signs": signs, "ends": self.ends}).encode()
        with self._sending:
            for rank, connection in list(self._connections.items()):
                if self.ends.get(rank) is not End.GONE:
                    with suppress(OSError):  # noticed when it is read
                        connection.send_bytes(text)


def meet(store: dist.Store, rank: int, hosts: list[str], limit: float) -> Peers:
    """Connect all ranks with rank 0; all must call it. Without connections, and with a warning, where some can't.

    Args:
        store: in which they meet.
        rank: of this process.
        hosts: names of the machines by rank.
        limit: seconds in which connections are made, and for which messages may stay unacknowledged.
    """
    connect = _accept if rank == 0 else _reach
    connections, trouble = connect(store, len(hosts), rank, limit)
    if rank == 0:
        store.set("peers/trouble", trouble)
    elif trouble:
        store.set(f"peers/{rank}", trouble)
    if trouble := store.get("peers/trouble").decode():
        if rank == 0:
            logger.warning("ranks that die won't be named: %s", trouble)
        for connection in connections.values():
            connection.close()
        connections = {}
    return Peers(rank, connections, hosts)


def _accept(store: dist.Store, ranks: int, rank: int, limit: float) -> tuple[dict[int, Connection], str]:
    """Connections to all other ranks, and why some are missing."""
    connections: dict[int, Connection] = {}
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    key, deadline = secrets.token_bytes(KEY), time.monotonic() + limit
    with socket.create_server(("", 0), family=family, backlog=ranks, dualstack_ipv6=dual) as server:
        store.set("peers/place", json.dumps([server.getsockname()[1], key.hex()]))
        while len(connections) < ranks - 1:
            if select.select([server], [], [], BEAT)[0]:
                with suppress(OSError):  # of one who went away meanwhile
                    accepted, _ = server.accept()
                    accepted.settimeout(BEAT)
                    said = accepted.recv(KEY + 4, socket.MSG_WAITALL)
                    if secrets.compare_digest(said[:KEY], key):  # else a stranger's
                        connections[int.from_bytes(said[KEY:])] = _connection(accepted, limit)
                continue
            missing = [r for r in range(1, ranks) if r not in connections]
            if failed := [r for r in missing if store.check([f"peers/{r}"])]:
                return connections, f"rank {failed[0]} {store.get(f'peers/{failed[0]}').decode()}"
            if time.monotonic() > deadline:
                return connections, f"rank {missing[0]} has not connected within {limit:g} s"
    return connections, ""


def _reach(store: dist.Store, ranks: int, rank: int, limit: float) -> tuple[dict[int, Connection], str]:
    """The connection to rank 0, or why there is none."""
    port, key = json.loads(store.get("peers/place"))
    address = os.environ["MASTER_ADDR"]
    try:
        reached = socket.create_connection((address, port), limit)
        reached.sendall(bytes.fromhex(key) + rank.to_bytes(4))
        return {0: _connection(reached, limit)}, ""
    except OSError as error:
        return {}, f"can't connect to rank 0 at {address}:{port}: {error}"


def _connection(connected: socket.socket, limit: float) -> Connection:
    connected.settimeout(None)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * limit))
    return Connection(connected.detach())
