"""Files that are found in a folder of the package and imported by name: methods, readers of data sets."""

from __future__ import annotations

import importlib
import importlib.util
import traceback
from pathlib import Path
from types import ModuleType

from framework.runtime.errors import UserError


def import_found(name: str) -> ModuleType:
    """The module ``name``, such as ``framework.local.methods.loco``.

    Raises:
        UserError: its file can't be imported; names the line of the last file of that folder in which it fails.
    """
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    file = Path(spec.origin)
    try:
        return importlib.import_module(name)
    except SyntaxError as error:
        raise UserError(f"{error.filename}, line {error.lineno}: can't be imported: {error.msg}") from error
    except Exception as error:  # whatever the file does when it is run
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if Path(frame.filename).parent == file.parent]
        where = f"{ours[-1].filename}, line {ours[-1].lineno}" if ours else str(file)
        raise UserError(f"{where}: can't be imported: {type(error).__name__}: {error}") from error
