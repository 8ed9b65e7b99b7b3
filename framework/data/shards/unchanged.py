"""Whether shards still hold what their index says, without reading all of them at every start."""

from __future__ import annotations

import json
import logging
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np

from framework.data.shards.scan import scan_shard
from framework.data.shards.shard_contents import Contents, IndexFiles
from framework.runtime import watchdog
from framework.runtime.errors import UserError
from framework.runtime.files import sha256_of, write_whole

logger = logging.getLogger(__name__)

_SMALL = 1 << 26  # bytes of a set that is always compared: a tenth of a second
_THREADS = 8  # that read; a checksum lets go of Python's lock


def check_same(folder: Path, contents: Contents, files: IndexFiles, read_only: bool) -> None:
    """Check that the shards of a folder, whose sizes are right, hold what was indexed.

    Small sets are compared by their checksums every time. In others, a shard is compared whole only once after it was
    touched: if a time of it is later than the index, as of copies, or than the one remembered of the last comparison.
    Without a checksum, its headers and labels are. Of the rest, and where nothing can be remembered, only the headers
    of the first and the last image of each shard are.

    Args:
        folder: of the shards.
        contents: of the index.
        files: the index.
        read_only: compare every shard whole, and remember nothing.

    Raises:
        UserError: a shard holds something else.
    """
    try:
        stamps = {name: _stamp(folder / name) for name in contents.shards}
        indexed = (folder / files.head).stat().st_mtime_ns
        version = sha256_of(folder / files.head)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error
    if read_only:
        _compare(folder, contents, files, list(stamps))
        return
    small = sum(contents.shards.values()) <= _SMALL
    always = [name for name in stamps if small and name in contents.sha256]
    memory = folder / f".{files.head.removesuffix('.json')}.seen.json"
    seen = _remembered(memory, version)
    touched = [name for name in stamps if stamps[name] > indexed and seen.get(name) != stamps[name]]
    once = sorted(set(touched) - set(always)) if os.access(folder, os.W_OK) else []
    rows = _rows(contents)
    for name in stamps.keys() - {*always, *once}:
        if not _ends_fit(folder / name, contents, rows[name]):
            raise _changed(folder, name, files)
    if once:
        size = sum(contents.shards[name] for name in once) / 1e9
        logger.info("comparing %d shards (%.1f GB) in %s with their index, once", len(once), size, folder)
    _compare(folder, contents, files, always + once)
    if once:
        with suppress(UserError):  # then the next start compares again
            known = seen | {name: stamps[name] for name in once}
            write_whole(memory, json.dumps({"index": version, "shards": known}))


def _stamp(path: Path) -> int:
    """When a file was last written, renamed, or made as a copy, in ns."""
    status = path.stat()
    return max(status.st_mtime_ns, status.st_ctime_ns)


def _remembered(memory: Path, version: str) -> dict[str, int]:
    """The stamps of shards when they were compared with this version of the index."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        found = json.loads(memory.read_bytes())
        if found["index"] == version:
            return dict(found["shards"])
    return {}


def _compare(folder: Path, contents: Contents, files: IndexFiles, names: list[str]) -> None:
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            for name, fits in zip(names, pool.map(partial(_fits, folder, contents), names), strict=True):
                watchdog.sign()
                if not fits:
                    raise _changed(folder, name, files)
        finally:
            pool.shutdown(cancel_futures=True)


def _fits(folder: Path, contents: Contents, name: str) -> bool:
    """Whether all of a shard is as indexed; without a checksum, its headers and labels."""
    if name in contents.sha256:
        try:
            return sha256_of(folder / name) == contents.sha256[name]
        except OSError as error:
            raise UserError(f"{folder / name}: cannot be read: {error.strerror}") from error
    found = np.array([sample[1:] for sample in scan_shard(folder / name).samples], np.int64)
    rows = _rows(contents)[name]
    table = contents.table
    return np.array_equal(
        found, np.stack([table.offset[rows], table.length[rows], table.label[rows]], axis=1)
    )


def _ends_fit(path: Path, contents: Contents, rows: slice) -> bool:
    """Whether the first and the last image of a shard have headers where the index says, with their lengths."""
    try:
        with open(path, "rb", buffering=0) as file:
            for row in {rows.start, rows.stop - 1}:
                file.seek(int(contents.table.offset[row]) - tarfile.BLOCKSIZE)
                header = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
                if header.size != contents.table.length[row]:
                    return False
    except tarfile.HeaderError:
        return False
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    return True


def _rows(contents: Contents) -> dict[str, slice]:
    """The rows of every shard in the table, which is in the order of shards."""
    numbers = np.arange(len(contents.shards) + 1, dtype=contents.table.shard.dtype)
    bounds = np.searchsorted(contents.table.shard, numbers).tolist()
    return {name: slice(*bounds[number : number + 2]) for number, name in enumerate(contents.shards)}


def _changed(folder: Path, name: str, files: IndexFiles) -> UserError:
    return UserError(
        f"{folder / name}: has other contents than when it was indexed, in as many bytes; copy it again, "
        f"or {files.rebuild}"
    )
