"""Writes WebDataset shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from uuid import uuid4

from webdataset import TarWriter

from framework.data.index import ShardSet
from framework.data.scan import IMAGE_EXTENSIONS
from framework.errors import UserError

Example = tuple[str, bytes, str, int | None]  # key, encoded image, its extension, label


def write_shards(
    samples: Iterable[Example], folder: Path, classes: list[str] | None, samples_per_shard: int = 1000
) -> None:
    """Write ``samples`` in their order as shards with their index and ``classes.json`` into a new folder.

    Equal samples give equal bytes. Everything is written beside ``folder`` and renamed when whole, so that a
    crash leaves no half-written ``folder``.

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
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty; remove it or name another folder")
    partial = folder.with_name(f".{folder.name}.{uuid4().hex}.partial")
    try:
        partial.mkdir(parents=True)
        if classes is not None:
            (partial / "classes.json").write_text(json.dumps(classes, indent=1) + "\n")
        _write(samples, partial, samples_per_shard)
        ShardSet.open(partial)
        partial.rename(folder)
    except UserError as error:
        raise UserError(str(error).replace(str(partial), str(folder))) from error
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(samples: Iterable[Example], folder: Path, samples_per_shard: int) -> None:
    with ExitStack() as shard:
        for number, (key, image, extension, label) in enumerate(samples):
            if number % samples_per_shard == 0:
                shard.close()
                file = shard.enter_context(
                    open(folder / f"shard-{number // samples_per_shard:06d}.tar", "wb")
                )
                writer = shard.enter_context(
                    TarWriter(file, encoder=False, mtime=0, user="root", group="root")
                )
            if extension.lower() not in IMAGE_EXTENSIONS:
                raise UserError(
                    f"key {key!r}: extension {extension!r} must be one of {', '.join(IMAGE_EXTENSIONS)}"
                )
            if not key or "." in key.rpartition("/")[2]:
                raise UserError(f"key {key!r}: must have no dot behind its last slash, and not be empty")
            members = {"__key__": key, extension: image}
            writer.write(members if label is None else members | {"cls": str(label).encode()})
