"""Whether a checkpoint is as it was written: its files against the manifest, alone or shared among the ranks."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import NamedTuple

from framework.checkpoints.folder import MANIFEST, files_of, shares_of
from framework.runtime.distributed import gather_text, rank, world_size
from framework.runtime.errors import UserError, is_transient
from framework.runtime.files import sha256_of


class Finding(NamedTuple):
    """What the ranks found of a checkpoint; the first of several.

    Attributes:
        damage: what is wrong with it; empty if nothing is.
        at_the_moment: the file system fails, and may not do so later.
        may_stay: it is the kind of failure that a bad sector makes as well; then an older checkpoint serves.
    """

    damage: str = ""
    at_the_moment: bool = False
    may_stay: bool = False


def common_finding(folder: Path) -> Finding:
    """Compare a checkpoint's files with its manifest, each on one rank; collective.

    Returns:
        On every rank the same, the gravest failure.
    """
    try:
        mine = Finding(damage_of(folder, rank(), world_size()) or "")
    except UserError as error:
        cause = error.__cause__
        mine = Finding(str(error), True, isinstance(cause, OSError) and cause.errno == errno.EIO)
    found = [Finding(*json.loads(text)) for text in gather_text(json.dumps(mine))]
    return max(found, key=lambda f: (f.at_the_moment and not f.may_stay, f.at_the_moment, bool(f.damage)))


def check_whole(folder: Path) -> None:
    """Check a checkpoint's files, each on one rank; collective.

    Raises:
        UserError: on every rank: it is missing or damaged, or can't be read for the moment.
    """
    found = common_finding(folder)
    if found.at_the_moment:
        raise UserError.as_transient(found.damage)
    if found.damage:
        raise UserError(f"{folder}: {found.damage}")


def damage_of(folder: Path, reader: int = 0, readers: int = 1) -> str | None:
    """What is wrong with a checkpoint's files, None if nothing is.

    Args:
        folder: of the checkpoint.
        reader: number of this process among those that share the files; each reads some.
        readers: how many do.

    Raises:
        UserError: the file system fails for the moment, so that nobody can say.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except OSError as error:
        return _unread(folder / MANIFEST, error)
    except ValueError:
        return f"{MANIFEST} is damaged"
    if not isinstance(manifest, dict) or set(manifest) != set(files_of(shares_of(manifest))):
        return f"{MANIFEST} is damaged"
    for name in [*manifest][reader::readers]:
        try:
            if sha256_of(folder / name) != manifest[name]:
                return f"{name} is damaged: its SHA-256 is not that of {MANIFEST}"
        except OSError as error:
            return _unread(folder / name, error)
    return None


def _unread(path: Path, error: OSError) -> str:
    if is_transient(error):
        raise UserError(f"{path}: can't be read for the moment: {error.strerror}") from error
    return f"{path.name} can't be read ({error.strerror})"
