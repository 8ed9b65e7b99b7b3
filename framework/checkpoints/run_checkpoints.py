"""The checkpoints of a run: ``<run_dir>/checkpoints/step-00000123/``, as many as are to stay."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from framework.checkpoints.damage import common_finding
from framework.checkpoints.folder import write_share
from framework.checkpoints.retention import Keep, superfluous
from framework.checkpoints.snapshot import Snapshot
from framework.runtime.distributed import from_main, is_main
from framework.runtime.errors import UserError
from framework.runtime.files import unlocked

logger = logging.getLogger(__name__)


def write_checkpoint(
    run_dir: Path,
    snapshot: Snapshot,
    keep: Keep,
    check: Callable[[], None] = unlocked,
    patience: Callable[[], float] = lambda: float("inf"),
) -> None:
    """Write this rank's share of a checkpoint; the first share's rank deletes those that ``keep`` does not want.

    Args:
        run_dir: folder of the run.
        snapshot: its step names the folder. One of that name is replaced.
        keep: judges by ``loss`` in the states.
        check: raises unless this process may still write.
        patience: as in ``write_share``.

    Raises:
        UserError: by ``check``; or it can't be written. Earlier checkpoints are untouched.
    """
    folder = checkpoint_folder(run_dir, snapshot.step)
    write_share(folder, snapshot.token, snapshot.share, snapshot.state, check, patience)
    if snapshot.share.number != 0:
        return
    # Later ones are those of a run that went back to an earlier step; they are not ours to delete.
    with suppress(OSError):  # where one can't be judged for the moment, the next save deletes
        losses = {_step(f): _loss(f) for f in _folders(run_dir) if _step(f) <= snapshot.step}
        for step in superfluous(losses, keep):
            shutil.rmtree(checkpoint_folder(run_dir, step), ignore_errors=True)


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, None if it has no checkpoint; all ranks must call it.

    The ranks share its files, and compare each with the manifest; a damaged checkpoint is passed over with a warning.

    Raises:
        UserError: on every rank: there are checkpoints and all of them are damaged; the file system fails for the
            moment.
    """
    folders: list[str] = from_main([str(folder) for folder in _folders(run_dir)] if is_main() else None)
    failing = ""
    for folder in map(Path, reversed(folders)):
        found = common_finding(folder)
        if not found.damage:
            return folder
        if found.at_the_moment:
            if not found.may_stay:
                raise UserError.as_transient(found.damage)
            failing = found.damage
        if is_main():
            logger.warning("%s: passed over: %s", folder, found.damage)
    if failing:
        raise UserError.as_transient(failing)
    if folders:
        raise UserError(
            f"{run_dir / 'checkpoints'}: all {len(folders)} checkpoints are damaged; delete them to start afresh"
        )
    return None


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


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step belongs."""
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
