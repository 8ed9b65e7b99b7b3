"""Remote shards on the local disk, as many as fit.

All processes of a machine share the cache of a URL. They take turns at fetching, so that no shard is fetched
twice and the bound holds; whoever already has a shard reads on meanwhile. A download has no name until it is
whole, so that a kill leaves nothing of it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from framework.data.shards.folder import OpenFile
from framework.data.shards.store import Store
from framework.runtime.errors import UserError

_TRIES = 3  # downloads of a shard whose checksum does not fit


class CachedShards:
    """Shards of a URL, fetched whole when first read, the longest unused removed to make room.

    Attributes:
        location: the URL.
    """

    def __init__(
        self, store: Store, folder: Path, limit: int, shards: dict[str, int], sha256: dict[str, str]
    ) -> None:
        """
        Args:
            store: reads the URL.
            folder: of the cache, on a local disk.
            limit: bytes that the shards in it may take together.
            shards: their sizes by name.
            sha256: checksums of those that have one.

        Raises:
            UserError: a shard is larger than ``limit``; the folder cannot be written.
        """
        self.location: Path | str = store.url
        self.store, self.limit, self.shards, self.sha256 = store, limit, shards, sha256
        self.folder = folder
        self._ahead: threading.Thread | None = None
        largest = max(shards, key=lambda name: shards[name])
        if shards[largest] > limit:
            raise UserError(
                f"data.cache_gb={limit / 1e9:g}: {store.url}/{largest} alone has "
                f"{shards[largest] / 1e9:.1f} GB"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache_dir: {self.folder} cannot be written: {error.strerror}") from error

    def open(self, name: str) -> OpenFile:
        """A shard, fetched if need be. Not kept open: an open file takes space even when removed.

        Raises:
            UserError: it cannot be fetched, or is not as indexed.
        """
        while True:
            with suppress(FileNotFoundError):
                file = OpenFile(self._path(name))
                os.utime(file.descriptor)  # the time of its last use
                return file
            self._fetch(name)

    def prefetch(self, names: list[str]) -> None:
        """Fetch in the background what is not here, unless that is still under way."""
        missing = [name for name in names if not self._path(name).exists()]
        if missing and (self._ahead is None or not self._ahead.is_alive()):
            self._ahead = threading.Thread(target=self._fetch_all, args=(missing,), daemon=True)
            self._ahead.start()

    def close(self) -> None:
        """Nothing is kept open."""

    def __reduce__(self) -> tuple[Any, ...]:
        return CachedShards, (self.store, self.folder, self.limit, self.shards, self.sha256)

    def learn(self, name: str, sha256: str) -> None:
        """Check later downloads of a shard against this."""
        before = self._path(name)
        self.sha256[name] = sha256
        with suppress(FileNotFoundError):
            before.rename(self._path(name))

    def _path(self, name: str) -> Path:
        """Another version of a shard has another name."""
        version = self.sha256.get(name, str(self.shards[name]))[:16]
        return self.folder / f"{version}-{name}"

    def _fetch_all(self, names: list[str]) -> None:
        with suppress(UserError):  # whoever reads the shard meets the error too
            for name in names:
                self._fetch(name)

    def _fetch(self, name: str) -> None:
        path = self._path(name)
        try:
            with open(self.folder / "lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                try:
                    if not path.exists():
                        self._make_room(self.shards[name])
                        self._download(name, path)
                finally:
                    fcntl.flock(lock, fcntl.LOCK_UN)  # also for a child forked meanwhile
        except OSError as error:
            raise UserError(f"data.cache_dir: {path} cannot be written: {_reason(error)}") from error

    def _make_room(self, size: int) -> None:
        cached = [
            (entry.stat(), entry.path) for entry in os.scandir(self.folder) if entry.name.endswith(".tar")
        ]
        used = sum(status.st_size for status, _ in cached)
        for status, path in sorted(cached, key=lambda entry: entry[0].st_mtime_ns):
            if used + size <= self.limit:
                return
            os.unlink(path)
            used -= status.st_size

    def _download(self, name: str, path: Path) -> None:
        expected = self.sha256.get(name)
        for _ in range(_TRIES):
            descriptor = os.open(self.folder, os.O_TMPFILE | os.O_RDWR, 0o644)
            with open(descriptor, "wb") as file:
                digest = hashlib.sha256()
                for part in self.store.parts(name, self.shards[name]):
                    file.write(part)
                    digest.update(part)
                file.flush()
                if expected in (None, digest.hexdigest()):
                    # Only with a folder, which the absolute path ignores, does Python follow the link.
                    os.link(f"/proc/self/fd/{descriptor}", path, src_dir_fd=descriptor)
                    return
        raise UserError(
            f"{self.location}/{name}: arrived {_TRIES} times with another checksum than indexed; "
            f"upload it again"
        )


def _reason(error: OSError) -> str:
    if error.errno in (errno.EOPNOTSUPP, errno.EISDIR):
        return "it must be a folder on a local disk (ext4, xfs, tmpfs), one that knows unnamed files"
    return error.strerror or str(error)
