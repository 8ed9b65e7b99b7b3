"""Nested dictionaries into nested dataclasses; whatever does not fit is named by its dotted key.

OmegaConf's structured configs would do this but for ``Literal``, ranges and its habit of turning the
text "3" into the number 3.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from omegaconf import MISSING


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


@dataclass(frozen=True)
class Rule:
    """A range: ``text`` completes "must be ..."."""

    text: str
    holds: Callable[[Any], bool]


PositiveInt = Annotated[int, Rule("at least 1", lambda v: v >= 1)]
NonNegativeInt = Annotated[int, Rule("at least 0", lambda v: v >= 0)]
Positive = Annotated[float, Rule("greater than 0", lambda v: v > 0)]
NonNegative = Annotated[float, Rule("at least 0", lambda v: v >= 0)]
Fraction = Annotated[float, Rule("at least 0 and below 1", lambda v: 0 <= v < 1)]
Share = Annotated[float, Rule("above 0 and at most 1", lambda v: 0 < v <= 1)]

T = TypeVar("T")
_SCALARS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text (in quotes)"}


def build(cls: type[T], node: Any, key: str = "") -> T:
    """An instance of the dataclass ``cls`` from the dictionary ``node``, which sits at ``key``.

    Raises:
        Fault: an unknown key, a value of the wrong type or out of range.
    """
    hints = get_type_hints(cls, include_extras=True)
    if not isinstance(node, dict):
        raise Fault(key, node, f"must be a section with the keys {', '.join(hints)}")
    for name in node:
        if name not in hints:
            raise Fault(_join(key, name), node[name])
    values = {name: _convert(hints[name], value, _join(key, name)) for name, value in node.items()}
    try:
        return cls(**values)
    except ValueError as error:  # a dataclass that checks itself
        raise Fault(key, node, str(error)) from error


def keys(cls: type, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a dataclass, sections included."""
    for name, kind in get_type_hints(cls).items():
        yield _join(prefix, name)
        if is_dataclass(kind):
            yield from keys(cast(type, kind), _join(prefix, name))


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def _convert(kind: Any, value: Any, key: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if value == MISSING:
        raise Fault(key, value, "must be given")
    if is_dataclass(kind):
        return build(cast(type, kind), value, key)
    if origin is Annotated:
        converted = _convert(arguments[0], value, key)
        for rule in arguments[1:]:
            if not rule.holds(converted):
                raise Fault(key, value, f"must be {rule.text}")
        return converted
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, key)
    if origin in (list, tuple):
        return _convert_sequence(origin, arguments, value, key)
    if kind is float and type(value) is int:
        return float(value)
    if origin is Literal:  # True == 1, and yet is no stage of ZeRO
        fits = any(value == choice and type(value) is type(choice) for choice in arguments)
    else:
        fits = kind is Any or type(value) is (origin or kind)
    if not fits or (kind is float and not math.isfinite(value)):
        raise Fault(key, value, f"must be {_describe(kind)}")
    return value


def _convert_union(kinds: tuple[Any, ...], value: Any, key: str) -> Any:
    choices = [kind for kind in kinds if kind is not type(None)]
    if value is None and len(choices) < len(kinds):
        return None
    if len(choices) == 1:
        return _convert(choices[0], value, key)
    for kind in choices:
        try:
            return _convert(kind, value, key)
        except Fault:
            continue
    raise Fault(key, value, f"must be {' or '.join(map(_describe, kinds))}")


def _convert_sequence(origin: type, arguments: tuple[Any, ...], value: Any, key: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise Fault(key, value, f"must be {_describe(origin[arguments])}")  # type: ignore[index]
    if origin is tuple and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            raise Fault(key, value, f"must be a list of {len(arguments)}, and has {len(value)} entries")
        kinds = arguments
    else:
        kinds = arguments[:1] * len(value)
    pairs = enumerate(zip(kinds, value, strict=True))
    return origin(_convert(kind, item, f"{key}[{i}]") for i, (kind, item) in pairs)


def _describe(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(map(_describe, arguments))
    if origin is Annotated:
        return f"{_describe(arguments[0])} ({arguments[1].text})"
    if origin in (list, tuple):
        fixed = origin is tuple and arguments[-1] is not Ellipsis
        return f"a list of {len(arguments) if fixed else 'any number'}, each {_describe(arguments[0])}"
    if kind is type(None):
        return "null"
    return "a section" if origin is dict else _SCALARS.get(kind, str(kind))
