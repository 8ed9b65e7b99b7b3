"""Files that are there whole or not at all, and their checksums: the one place that writes and hashes them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

from framework.runtime.errors import UserError


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which gets the name ``path`` when the block ends: then all of it is on the disk.

    Whoever reads ``path`` meanwhile sees the earlier file. If the block raises, that one stays. Several processes
    may do this for one path at once; the last one to end wins.

    Raises:
        OSError: it can't be written.
    """
    partial = path.with_name(f".{path.name}.{uuid4().hex[:8]}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            # File servers may say only here, and only to the process that wrote, that there was no room.
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, and its folder if there is none, as ``new_file`` does.

    Raises:
        UserError: it can't be written; an earlier file of that name is untouched.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as file:
            file.write(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise UserError(f"{path}: can't be written: {error.strerror}") from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        UserError: it can't be read, or holds something else.
    """
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: damaged: no JSON") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: damaged: must hold a JSON object")
    return found


def check_name(path: str, key: str) -> None:
    """Check that something could have this path.

    Args:
        path: of a file or folder that may not exist yet.
        key: of the recipe, in which it stands.

    Raises:
        UserError: it is empty, or the file system doesn't take it.
    """
    if not path:
        raise UserError(f"{key}: must be a path, and is empty")
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UserError(f"{key}={path}: {error.strerror}") from error


def unlocked() -> None:
    """In place of ``RunLock.check`` where nobody else may write."""


def sha256_of(content: Path | bytes) -> str:
    """SHA-256 of bytes, or of what a file holds, in hexadecimal.

    Raises:
        OSError: the file can't be read.
    """
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
