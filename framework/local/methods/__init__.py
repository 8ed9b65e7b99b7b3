"""One file per method. Each has ``Options``, with the published defaults, and ``plan(task, options)``.

A new method is a new file here; its name in a recipe is the file's.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from framework.runtime.errors import UserError


def names() -> list[str]:
    """The methods there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """The module of method ``name``.

    Raises:
        UserError: there is no such method.
    """
    if name not in names():
        raise UserError(f"method.name={name}: must be one of {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")
