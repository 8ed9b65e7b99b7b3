"""Shards opened for reading: what a set of shards asks for, and how a local folder gives it."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any, Protocol

from framework.runtime.errors import UserError

_OPEN_FILES = 256  # per process; the usual limit is 1024 for everything


class OpenFile:
    """Closed when its last reader drops it, so that no cache pulls it from under another thread."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def check_folder(folder: Path) -> None:
    """Check that a folder of shards is there.

    Raises:
        UserError: no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; it must hold the shards (*.tar)")


class ShardFiles(Protocol):
    """Where shards come from. Safe to use from several threads, after a fork, and to pickle.

    Attributes:
        location: folder or URL.
    """

    location: Path | str

    def open(self, name: str) -> OpenFile:
        """A shard to read; raises ``OSError`` or ``UserError``."""
        ...

    def prefetch(self, names: list[str]) -> None:
        """Say which shards will be opened next."""
        ...

    def close(self) -> None:
        """Let go of open shards; they open again when needed."""
        ...


class Folder:
    """Shards on a local disk."""

    def __init__(self, location: Path) -> None:
        self.location: Path | str = location
        self._opened = functools.lru_cache(_OPEN_FILES)(OpenFile)

    def open(self, name: str) -> OpenFile:
        return self._opened(Path(self.location) / name)

    def prefetch(self, names: list[str]) -> None:
        """Nothing to do: the disk is near."""

    def close(self) -> None:
        self._opened.cache_clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return Folder, (self.location,)
