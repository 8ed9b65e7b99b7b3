"""Where the splits of a recipe lie: folder and pattern of each, by the keys of ``data``; without PyTorch."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from framework.config.recipe import Data
from framework.data.shards.folder import check_folder
from framework.data.shards.naming import cut_pattern, is_held_out, series, split_of
from framework.data.shards.store import is_url
from framework.runtime.errors import UserError


def check_train_folder(data: Data) -> None:
    """Check that the folder of the training split is there, unless its images are packed first or behind a URL.

    Raises:
        UserError: no such folder; or as ``check_path``.
    """
    check_path(data)
    if data.prepare == "none" and not is_url(data.path):
        check_split(data, data.train)


def split_path(data: Data, split: str) -> tuple[str, str | None]:
    """The folder of a split, and which of its shards; "." is ``data.path`` itself."""
    split = split.removeprefix("./").rstrip("/")
    folder, pattern = cut_pattern(f"{data.path.rstrip('/') or '/'}/{split}")
    return folder.removesuffix("/."), pattern


def check_path(data: Data) -> None:
    """Refuse a path that names shards rather than the folder of the splits, or is empty (a shell's variable, not set).

    Raises:
        UserError: it is so.
    """
    for key, value in {"path": data.path, "cache_dir": data.cache_dir if is_url(data.path) else "."}.items():
        if not value.strip():
            raise UserError(f"data.{key}: is empty, and must name a folder (. for this one)")
    folder, pattern = cut_pattern(data.path)
    if pattern is not None and (is_url(data.path) or not os.path.isdir(data.path)):
        raise UserError(
            f"data.path={data.path}: names shards, and must be a folder; set data.path={folder} "
            f"data.train='{pattern}', and data.test to those that are held out"
        )
    for key, split in {"train": data.train, "test": data.test}.items() if not is_url(data.path) else ():
        folder, _ = split_path(data, split)
        try:
            with suppress(FileNotFoundError, NotADirectoryError):
                os.stat(folder)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"data.path, data.{key}: {folder!r} cannot be a folder: {reason}") from error


def check_split(data: Data, split: str) -> None:
    """Check that the folder of a split is there.

    Raises:
        UserError: no such folder; says which keys would name the shards that ``data.path`` has elsewhere.
    """
    folder = Path(split_path(data, split)[0])
    if not folder.is_dir():
        _explain_missing(data, folder)
    check_folder(folder)


def _explain_missing(data: Data, folder: Path) -> None:
    """Say which keys would name the shards that ``data.path`` has in itself, or in folders of other names."""
    root = Path(data.path)
    names = [path.name for path in root.glob("*.tar")]
    folders = sorted({path.parent.name for path in root.glob("*/*.tar")})
    if folders and not names:
        raise UserError(
            f"{folder}: no such folder; {root} has shards in {', '.join(folders[:5])}: set data.train to one of these, "
            f"and data.test"
        )
    if not names:
        return
    found = series(names)
    train = next((glob for glob in found if split_of(glob).startswith("train")), next(iter(found)))
    test = next((glob for glob in found if is_held_out(split_of(glob))), None)
    keys = f"data.train='{train}'" if len(found) > 1 else "data.train=."
    held_out = f" data.test='{test}'" if len(found) > 1 and test else ""
    raise UserError(f"{folder}: no such folder; the shards lie in {root} itself, so set {keys}{held_out}")
