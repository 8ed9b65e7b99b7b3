"""Methods by name: ``NAME`` is the file ``framework/local/methods/NAME.py``.

A recipe names its method as its ``defaults`` name other recipes. As Hydra finds those among the files of a folder, this
module finds the method's file and imports it when a recipe asks for it; ``config`` itself imports no method.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import is_dataclass, make_dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from framework.config.method_options import MethodOptions
from framework.config.schema import check_declaration
from framework.runtime.errors import UserError
from framework.runtime.imports import import_found

FOLDER = Path(__file__).resolve().parents[1] / "local" / "methods"


class Method(NamedTuple):
    """What a method's file defines.

    Attributes:
        name: of the file, and of the method in recipes.
        Options: a dataclass, subclass of ``MethodOptions``; its fields are the keys of a recipe's ``method:`` section.
        plan: ``plan(network, options)`` gives the local units.
    """

    name: str
    Options: type[MethodOptions]
    plan: Callable[..., Any]


def names() -> list[str]:
    """The methods there are."""
    return sorted(module.name for module in pkgutil.iter_modules([str(FOLDER)]))


@cache
def load(name: str) -> Method:
    """The method ``name``.

    Raises:
        UserError: there is no such method; its file can't be imported; ``Options`` or ``plan`` is missing or not as it
            must be.
    """
    if name not in names():
        raise UserError(f"method.name={name}: must be one of {', '.join(names())}")
    module = import_found(f"framework.local.methods.{name}")
    defined = vars(module)
    options, plan = defined.get("Options"), defined.get("plan")
    if not (isinstance(options, type) and is_dataclass(options)):
        raise UserError(f"{module.__file__}: must define a dataclass Options, the method's part of a recipe")
    try:
        check_declaration(options)
    except TypeError as error:
        raise UserError(f"{module.__file__}: Options: {error}") from error
    if not callable(plan):
        raise UserError(
            f"{module.__file__}: must define a function plan(network, options) that returns a Plan"
        )
    return Method(name, _based(options), plan)


def _based(options: type) -> type[MethodOptions]:
    """``options`` with the base class ``MethodOptions``, which a method may leave out."""
    if issubclass(options, MethodOptions):
        return options
    frozen = options.__dataclass_params__.frozen  # type: ignore[attr-defined]
    same = {"__module__": options.__module__, "__doc__": options.__doc__}
    return make_dataclass(options.__name__, [], bases=(options, MethodOptions), namespace=same, frozen=frozen)
