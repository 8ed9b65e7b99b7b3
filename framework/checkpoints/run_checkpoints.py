"""The checkpoints of a run: ``<run_dir>/checkpoints/step-00000123/``, as many as are to stay."""

from __future__ import annotations

import errno
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from framework.checkpoints.folder import damage_of, write_files
from framework.checkpoints.retention import Keep, superfluous
from framework.checkpoints.snapshot import Snapshot, take_snapshot
from framework.engines.base import Engine
from framework.runtime.distributed import from_main, is_main, same_outcome
from framework.runtime.errors import UserError
from framework.runtime.files import unlocked

logger = logging.getLogger(__name__)


def write_checkpoint(
    run_dir: Path, snapshot: Snapshot, keep: Keep | None = None, check: Callable[[], None] = unlocked
) -> Path:
    """Write a checkpoint on this rank alone, and delete those that ``keep`` does not want.

    Args:
        run_dir: folder of the run.
        snapshot: of rank 0; its step names the folder. One of that name is replaced.
        keep: judges by ``loss`` in the states; two stay if left out.
        check: raises unless this process may still write.

    Returns:
        The new folder.

    Raises:
        UserError: by ``check``; or it can't be written. Earlier checkpoints are untouched.
    """
    folder = _folder(run_dir, snapshot.step)
    write_files(folder, snapshot.model, snapshot.optimizer, snapshot.state, check)
    # Later ones are those of a run that went back to an earlier step; they are not ours to delete.
    with suppress(OSError):  # where one can't be judged for the moment, the next save deletes
        losses = {_step(f): _loss(f) for f in _folders(run_dir) if _step(f) <= snapshot.step}
        for step in superfluous(losses, keep or Keep()):
            shutil.rmtree(_folder(run_dir, step), ignore_errors=True)
    return folder


def save_checkpoint(
    run_dir: Path, engine: Engine, step: int, state: Mapping[str, Any], keep: Keep | None = None
) -> Path:
    """``take_snapshot`` and ``write_checkpoint`` in one; all ranks must call it, and return when it is on the disk.

    Raises:
        UserError: on every rank, as they do.
    """
    snapshot = take_snapshot(engine, step, state)
    with same_outcome():
        if is_main():
            write_checkpoint(run_dir, snapshot, keep)
    return _folder(run_dir, step)


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, None if it has no checkpoint; all ranks must call it.

    Rank 0 compares every file with the manifest; a damaged checkpoint is passed over with a warning.

    Raises:
        UserError: there are checkpoints and all of them are damaged.
    """
    found = None
    with same_outcome():
        if is_main():
            found = _newest_whole(run_dir)
    path = from_main(str(found) if found else None)
    return Path(path) if path else None


def set_aside_later(run_dir: Path, step: int) -> list[str]:
    """Rename checkpoints past ``step``, which a run that goes back there would take for its own; the new names."""
    renamed = []
    for folder in _folders(run_dir):
        if _step(folder) > step:
            aside = folder.with_name(f"abandoned-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            renamed.append(folder.rename(aside).name)
    return renamed


def _folders(run_dir: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    return sorted(
        (f for f in run_dir.glob("checkpoints/step-*") if f.is_dir() and re.fullmatch(r"step-\d+", f.name)),
        key=_step,
    )


def _folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _loss(folder: Path) -> float | None:
    """What ``state`` said of it; ``None`` for one that is damaged or has none.

    Raises:
        OSError: the file system fails.
    """
    try:
        return float(json.loads((folder / "state.json").read_text())["loss"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _newest_whole(run_dir: Path) -> Path | None:
    folders = _folders(run_dir)
    unread: UserError | None = None
    for folder in reversed(folders):
        damage: str | UserError | None
        try:
            damage = damage_of(folder)
        except UserError as error:
            if not (isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EIO):
                raise  # EIO may be a bad sector, which stays: then an older checkpoint serves
            damage = unread = error
        if damage is None:
            return folder
        logger.warning("%s: passed over: %s", folder, damage)
    if unread:
        raise unread
    if folders:
        raise UserError(
            f"{run_dir / 'checkpoints'}: all {len(folders)} checkpoints are damaged; delete them to start afresh"
        )
    return None
