"""One file per method. Each has ``Options``, with the published defaults, and ``plan(network, options)``.

A new method is a new file here; its name in a recipe is the file's.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, NamedTuple

from framework.local.options import MethodOptions
from framework.local.units import NetworkInfo, Plan
from framework.runtime.errors import UserError


class Method(NamedTuple):
    """What a method's file defines.

    Attributes:
        name: of the file, and of the method in recipes.
        Options: a dataclass; its fields are keys of the recipe's ``method:`` section.
        plan: called with the network and options, gives the plan.
    """

    name: str
    Options: type[MethodOptions]
    plan: Callable[[NetworkInfo, Any], Plan]


def names() -> list[str]:
    """The methods there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Method:
    """The method called ``name``.

    Raises:
        UserError: there is no such method, or its file lacks ``Options`` or ``plan``.
    """
    if name not in names():
        raise UserError(f"method.name={name}: must be one of {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    return checked(name, vars(module), str(module.__file__))


def checked(name: str, defined: dict[str, Any], file: str) -> Method:
    """The method that a file defines.

    Raises:
        UserError: ``Options`` or ``plan`` is missing or not of the kind that it must be.
    """
    options, plan = defined.get("Options"), defined.get("plan")
    if not (isinstance(options, type) and issubclass(options, MethodOptions) and is_dataclass(options)):
        raise UserError(
            f"{file}: must define a dataclass Options(MethodOptions), MethodOptions from framework.local"
        )
    if not callable(plan):
        raise UserError(f"{file}: must define a function plan(network, options) that returns a Plan")
    return Method(name, options, plan)
