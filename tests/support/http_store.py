"""Servers on loopback that drop connections."""

from __future__ import annotations

import re
import socket
import socketserver
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Server:
    """What the server serves, does wrong and has seen.

    Attributes:
        root: folder of the files.
        drops: how often the connection breaks in the middle of each answer before one is whole.
        ranges: whether parts of files can be asked for.
        statuses: what is answered instead of files, by the first folder of the path.
        spoiled: names of files in which the last byte arrives changed.
        seen: requests by method and path, dropped ones too.
    """

    root: Path
    drops: int = 0
    ranges: bool = True
    statuses: dict[str, int] = field(default_factory=dict)
    spoiled: set[str] = field(default_factory=set)
    seen: Counter[str] = field(default_factory=Counter)
    url: str = ""


@contextmanager
def serve(root: Path, **settings: object) -> Iterator[Server]:
    state = Server(root, **settings)
    dropped: Counter[str] = Counter()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, body: bool) -> None:
            state.seen[f"{self.command} {self.path}"] += 1
            if status := state.statuses.get(self.path.split("/")[1]):
                self.send_error(status)
                return
            path = state.root / self.path.strip("/")
            if path.is_dir():
                data = "".join(f'<a href="{p.name}">{p.name}</a>\n' for p in path.iterdir()).encode()
            elif path.is_file():
                data = path.read_bytes()
            else:
                self.send_error(404)
                return
            if path.name in state.spoiled:
                data = data[:-1] + bytes([data[-1] ^ 1])
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            partly = span is not None and state.ranges
            part = data[int(span[1]) : int(span[2]) + 1] if span and partly else data
            self.send_response(206 if partly else 200)
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            if body:
                request = f"{self.path} {self.headers.get('Range')}"
                dropped[request] += 1
                if dropped[request] <= state.drops:
                    self.wfile.write(part[: len(part) // 2])
                    self.close_connection = True
                else:
                    self.wfile.write(part)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        state.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield state
        server.shutdown()


@dataclass
class Breaker:
    """A door to another server on loopback; long answers through it break off.

    Attributes:
        breaks: how many answers break off from now on.
        broken: how many have.
    """

    url: str = ""
    breaks: int = 0
    broken: int = 0


@contextmanager
def breaking(host: str, port: int, after: int = 3000) -> Iterator[Breaker]:
    """Pass connections on to ``host:port``; while ``breaks`` lasts, end them after so many bytes of answer."""
    state = Breaker()

    class Door(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection((host, port)) as behind:
                threading.Thread(target=self._asks, args=(behind,), daemon=True).start()
                answered = 0
                with suppress(OSError):
                    while data := behind.recv(1000):
                        answered += len(data)
                        if answered > after and state.breaks > 0:
                            state.breaks -= 1
                            state.broken += 1
                            return
                        self.request.sendall(data)

        def _asks(self, behind: socket.socket) -> None:
            with suppress(OSError):
                while data := self.request.recv(65536):
                    behind.sendall(data)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Door) as door:
        door.daemon_threads = True
        state.url = f"http://127.0.0.1:{door.server_address[1]}"
        threading.Thread(target=door.serve_forever, args=(0.05,), daemon=True).start()
        yield state
        door.shutdown()
