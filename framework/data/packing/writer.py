"""Writes WebDataset shards."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain, islice
from pathlib import Path
from typing import TextIO

from webdataset import TarWriter

from framework.data.shards.image_types import IMAGE_EXTENSIONS
from framework.data.shards.index import index_shards
from framework.runtime.errors import UserError
from framework.runtime.files import new_file

Example = tuple[str, bytes, str, int | None]  # key, encoded image, its extension, label

_LOCK = ".lock"


def write_shards(
    samples: Iterable[Example], folder: Path, classes: list[str] | None, samples_per_shard: int = 1000
) -> None:
    """Write ``samples`` in their order as shards with their index and ``classes.json`` into a new folder.

    Equal samples give equal bytes. A crash leaves no half-written ``folder``.

    Args:
        samples: (key, encoded image, extension, label or ``None``); keys without dots in their last
            component.
        folder: does not exist yet, or is empty.
        classes: names in the order of labels; ``None`` for unnamed classes or samples without labels.
        samples_per_shard: at most.

    Raises:
        UserError: the folder has contents; a key, extension or label is unusable; nothing to write; disk
            full.
    """
    with new_folder(Path(folder)) as partial:
        try:
            clear(partial)
            rest, number = iter(samples), 0
            while (first := next(rest, None)) is not None:
                write_shard(partial / shard_name(number), chain([first], islice(rest, samples_per_shard - 1)))
                number += 1
            write_classes(partial, classes)
            index_shards(partial).save(partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder beside ``folder`` that becomes it when the block ends well.

    One process at a time holds it; others wait. What a killed process left in it is still there, for the
    block to go on from or to ``clear``.

    Raises:
        UserError: ``folder`` has contents; it is "." or "/"; it cannot be written, the disk being full for one.
    """
    if not folder.name:
        raise UserError(f"{folder}: cannot be replaced; name a folder that does not exist yet")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        with _claim(partial):
            if folder.exists() and any(folder.iterdir()):
                shutil.rmtree(partial)
                raise UserError(f"{folder}: is not empty; remove it or name another folder")
            yield partial
            (partial / _LOCK).unlink()
            partial.rename(folder)
    except UserError as error:
        raise UserError(str(error).replace(str(partial), str(folder))) from error
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from error


def clear(partial: Path) -> None:
    """Empty a folder of ``new_folder``."""
    for path in partial.iterdir():
        if path.name != _LOCK:
            path.unlink()


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:06d}.tar"


def write_shard(path: Path, samples: Iterable[Example]) -> None:
    """Write one shard; it has its name only when whole and on the disk.

    Raises:
        UserError: a key, extension or label is unusable.
    """
    with (
        new_file(path) as file,
        TarWriter(file, encoder=False, mtime=0, user="root", group="root") as writer,
    ):
        for sample in samples:
            writer.write(_members(*sample))


def write_classes(folder: Path, classes: list[str] | None) -> None:
    """Write ``classes.json`` where classes have names."""
    if classes is not None:
        (folder / "classes.json").write_text(json.dumps(classes, indent=1) + "\n")


def _claim(folder: Path) -> TextIO:
    """An open file that holds the folder, made if need be; a crash lets go of it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError), ExitStack() as stack:
            lock = stack.enter_context(open(folder / _LOCK, "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Whoever held it before may have renamed or removed the folder, lock and all.
            if os.stat(folder / _LOCK).st_ino == os.fstat(lock.fileno()).st_ino:
                stack.pop_all()
                return lock


def _members(key: str, image: bytes, extension: str, label: int | None) -> dict[str, str | bytes]:
    if extension.lower() not in IMAGE_EXTENSIONS:
        raise UserError(f"key {key!r}: extension {extension!r} must be one of {', '.join(IMAGE_EXTENSIONS)}")
    if not key or "." in key.rpartition("/")[2]:
        raise UserError(f"key {key!r}: must have no dot behind its last slash, and not be empty")
    members: dict[str, str | bytes] = {"__key__": key, extension: image}
    return members if label is None else members | {"cls": str(label).encode()}
