"""A process that holds the folder of a run, and says whether it may still write there."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from pathlib import Path

from framework.runtime import run_lock
from framework.runtime.errors import UserError
from framework.runtime.run_lock import take
from tests.support.forked import Forked
from tests.support.pool import CONTEXT


def holds(folder: Path, connection: Connection, variables: dict[str, str]) -> None:
    """Take the folder, and try to write into it whenever asked, until that is refused."""
    os.environ.update(variables)
    run_lock.BEAT = 0.1
    lock = take(folder)
    (folder / "recipe.yaml").touch()
    connection.send("taken")
    while connection.recv():
        try:
            lock.check()
            connection.send("written")
        except UserError as error:
            connection.send(f"{type(error).__name__}: {error}")
    lock.release()


class Start:
    """A process that has taken the folder."""

    def __init__(self, folder: Path, name: str = "first", **variables: str) -> None:
        self.connection, theirs = CONTEXT.Pipe()
        self.process = Forked(folder.parent / name, holds, folder, theirs, variables)

    def __enter__(self) -> Start:
        self.process.__enter__()
        assert self.connection.recv() == "taken"
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.__exit__()

    def writes(self) -> str:
        """Let it try; what came of it."""
        self.connection.send(True)
        return str(self.connection.recv())

    def ends(self) -> None:
        """Let it release the folder."""
        self.connection.send(False)
        assert self.process.status() == 0
