"""Where a recipe's images are, told without opening them and without PyTorch."""

from __future__ import annotations

from pathlib import Path

from framework.config.recipe import Data
from framework.data.shards.store import is_url
from framework.runtime.errors import UserError


def check_train_folder(data: Data) -> None:
    """Check that the folder of the training split is there, unless its images are packed first or behind a URL.

    Raises:
        UserError: no such folder.
    """
    if data.prepare == "none" and not is_url(data.path):
        check_folder(Path(data.path) / data.train)


def check_folder(folder: Path) -> None:
    """Check that a folder of shards is there.

    Raises:
        UserError: no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; it must hold the shards (*.tar)")
