"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from framework.runtime.errors import UserError


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, and its folder; on the disk when this returns.

    Raises:
        UserError: it can't be written; an earlier file of that name is untouched.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(f"{path}: can't be written: {error.strerror}") from error
