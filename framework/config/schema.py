"""Nested dictionaries into nested dataclasses. pydantic checks them; here its findings become messages for a recipe.

A section of a recipe is a plain ``@dataclass``, best a frozen one. Its annotations say types and ranges, which pydantic
applies strictly (no text for a number, no unknown key) to the section and to every section in it.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import astuple, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from omegaconf import MISSING
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError


class Fault(Exception):
    """A key that does not fit.

    Attributes:
        key: dotted, from the root.
        value: what stands there.
        problem: what would be right; empty where no such key exists.
    """

    def __init__(self, key: str, value: object, problem: str = "") -> None:
        super().__init__(f"{key}={value}: {problem or 'unknown key'}")
        self.key, self.value, self.problem = key, value, problem


def _no_flag(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("literal_error", "no flag")
    return value


def _fits(value: float) -> float:
    """Refuse what PyTorch can't take, without a word of it in messages about other values."""
    largest = 2**31 - 1 if isinstance(value, int) else 1e35  # float32 holds it, also times a weight decay
    if value > largest:
        raise ValueError(
            f"must be at most {largest:g}" if isinstance(value, float) else f"must be at most {largest}"
        )
    return value


PositiveInt = Annotated[int, Field(ge=1), AfterValidator(_fits)]
NonNegativeInt = Annotated[int, Field(ge=0), AfterValidator(_fits)]
Positive = Annotated[float, Field(gt=0), AfterValidator(_fits)]
NonNegative = Annotated[float, Field(ge=0), AfterValidator(_fits)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Portion = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
NoFlag = BeforeValidator(_no_flag)  # beside a Literal of numbers, which would take true for 1

T = TypeVar("T")

_CONFIG = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
_SCALARS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text (in quotes)"}
_RANGES = {"greater_than_equal", "greater_than", "less_than_equal", "less_than"}


def build(cls: type[T], node: Any, key: str = "") -> T:
    """An instance of the dataclass ``cls`` from the dictionary ``node``, which sits at ``key``.

    Raises:
        Fault: an unknown key, a value that is missing, of the wrong type or out of range.
    """
    _refuse_missing(node, key)
    try:
        # As JSON, whose arrays serve as tuples and whose objects as dataclasses.
        (built,) = _adapter(cls).validate_json(json.dumps([node]))
    except TypeError as error:
        raise Fault(key, node, f"must be text, numbers, lists and sections ({error})") from error
    except ValidationError as error:
        errors = error.errors(include_url=False)
        unknown = (e for e in errors if e["type"] == "unexpected_keyword_argument")
        raise _fault(cls, next(unknown, errors[0]), key) from error
    return cast(T, built)


def check_declaration(cls: type) -> None:
    """Check that a dataclass can be a section of a recipe.

    Raises:
        TypeError: a field without a default, or of a type that pydantic can't check.
    """
    for field in fields(cls):
        if field.default is NO_DEFAULT and field.default_factory is NO_DEFAULT:
            raise TypeError(f"{field.name} must have a default")
    try:
        _adapter(cls)
    except (NameError, PydanticUserError) as error:
        raise TypeError(str(error).splitlines()[0]) from error


def keys(cls: type, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a dataclass, sections included."""
    for name, kind in get_type_hints(cls).items():
        yield _join(prefix, name)
        if is_dataclass(section := _optional(kind)):
            yield from keys(cast(type, section), _join(prefix, name))


def _adapter(cls: type) -> TypeAdapter[list[Any]]:
    """Checks a list of ``cls``, which hands its configuration on to the dataclasses in it: they take none directly."""
    return TypeAdapter(list[cls], config=_CONFIG)  # type: ignore[valid-type]


def _refuse_missing(node: Any, key: str) -> None:
    """OmegaConf's ``???`` stands for a value that somebody else must give."""
    if node == MISSING:
        raise Fault(key, node, "must be given")
    for name, value in node.items() if isinstance(node, dict) else ():
        _refuse_missing(value, _join(key, name))


def _fault(cls: type, error: ErrorDetails, key: str) -> Fault:
    """What pydantic found, in the words of a recipe."""
    value, name, location = error["input"], error["type"], error["loc"][1:]
    if name == "unexpected_keyword_argument":
        key, _ = _place(cls, location[:-1], key)
        return Fault(_join(key, location[-1]), value)
    short = name == "missing" and isinstance(location[-1], int)
    key, kind = _place(cls, location[:-1] if short else location, key)
    kind = _optional(kind)
    if name == "value_error":  # a dataclass that checks itself, or a validator of its own
        return Fault(key, value, str(error["ctx"]["error"]))
    if name == "missing" and not short:
        return Fault(key, MISSING, "must be given")
    if short or (name == "too_long" and get_origin(kind) is tuple):
        return Fault(key, value, f"must be a list of {len(get_args(kind))}, and has {len(value)} entries")
    if name in _RANGES and get_origin(kind) is Annotated:
        return Fault(key, value, f"must be {_range(kind)}")
    return Fault(key, value, f"must be {_describe(kind)}")


def _place(cls: type, location: Sequence[int | str], key: str) -> tuple[str, Any]:
    """The dotted key and the annotation at a location of pydantic's, which goes on into the members of a union."""
    kind: Any = cls
    for part in location:
        inner = _optional(kind)
        origin, arguments = get_origin(inner), get_args(inner)
        if is_dataclass(inner):
            key, kind = _join(key, part), get_type_hints(inner, include_extras=True)[str(part)]
        elif origin is dict:
            key, kind = _join(key, part), arguments[1]
        elif origin is list or (origin is tuple and arguments[-1] is Ellipsis):
            key, kind = f"{key}[{part}]", arguments[0]
        elif origin is tuple:
            key, kind = f"{key}[{part}]", arguments[int(part)]
        else:
            break
    return key, kind


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def _optional(kind: Any) -> Any:
    """``X`` of ``X | None``; anything else as it is."""
    if get_origin(kind) in (Union, types.UnionType):
        members = [member for member in get_args(kind) if member is not type(None)]
        return members[0] if len(members) == 1 else kind
    return kind


def _range(kind: Any) -> str:
    """The range of an annotated number; completes "must be ..."."""
    words = {Ge: "at least", Gt: "greater than", Le: "at most", Lt: "below"}
    bounds = [
        f"{words[type(bound)]} {astuple(bound)[0]:g}"
        for extra in get_args(kind)[1:]
        for bound in (extra.metadata if isinstance(extra, FieldInfo) else [extra])
        if type(bound) in words
    ]
    return " and ".join(bounds)


def _describe(kind: Any) -> str:
    """What an annotation admits; completes "must be ..."."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(map(_describe, arguments))
    if origin is Annotated:
        bounds = _range(kind)
        return _describe(arguments[0]) + (f" ({bounds})" if bounds else "")
    if origin in (list, tuple):
        fixed = origin is tuple and arguments[-1] is not Ellipsis
        return f"a list of {len(arguments) if fixed else 'any number'}, each {_describe(arguments[0])}"
    if is_dataclass(kind):
        return f"a section with the keys {', '.join(get_type_hints(kind))}"
    if kind is type(None):
        return "null"
    return "a section" if origin is dict else _SCALARS.get(kind, str(kind))
