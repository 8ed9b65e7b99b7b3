"""Dictionaries into dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from pydantic import AfterValidator, Field

from framework.config.schema import Fault, Fraction, NoFlag, PositiveInt, build, keys


@dataclass
class Inner:
    ratio: Fraction = 0.5
    pair: tuple[int, str] = (1, "a")


def check_odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError("must be odd")
    return value


@dataclass
class Plain:
    lists: dict[str, list[str]] = field(default_factory=dict)
    one: Annotated[Literal[1, 2], NoFlag] = 1
    flag: bool = False
    odd: Annotated[int, AfterValidator(check_odd)] = 1
    small: Annotated[float, Field(gt=0, le=0.5)] = 0.1

    def __post_init__(self) -> None:
        if self.odd == 13:
            raise ValueError("13 brings bad luck")


@dataclass
class Required:
    given: int


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)
    many: tuple[float, ...] = ()
    count: PositiveInt | None = None
    mode: Literal["a", "b"] | float = "a"
    rest: dict[str, Any] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    plain: Plain = field(default_factory=Plain)
    required: Required | None = None


def test_schema_converts_what_yaml_can_not_say() -> None:
    node = {
        "inner": {"ratio": 0, "pair": [2, "b"]},
        "many": [1, 2.5],
        "count": 3,
        "mode": 2,
        "rest": {"x": [None]},
    }
    assert build(Outer, node) == Outer(Inner(0.0, (2, "b")), (1.0, 2.5), 3, 2.0, {"x": [None]})
    assert type(build(Outer, node).many[0]) is float
    assert list(keys(Outer)) == [
        "inner",
        "inner.ratio",
        "inner.pair",
        "many",
        "count",
        "mode",
        "rest",
        "names",
        *("plain", "plain.lists", "plain.one", "plain.flag", "plain.odd", "plain.small"),
        *("required", "required.given"),
    ]


@pytest.mark.parametrize(
    ("node", "key", "problem"),
    [
        ({"inner": {"ratio": 1.0}}, "inner.ratio", "must be at least 0 and below 1"),
        ({"inner": {"pair": [1, 2]}}, "inner.pair[1]", "must be text"),
        ({"inner": {"pair": [1, "a", "b"]}}, "inner.pair", "must be a list of 2, and has 3 entries"),
        ({"inner": {"rat": 1}}, "inner.rat", ""),
        ({"many": [1, "x"]}, "many[1]", "must be a finite number"),
        ({"many": 3}, "many", "must be a list of any number, each a finite number"),
        ({"count": 0}, "count", "must be at least 1"),
        ({"count": "3"}, "count", "must be a whole number"),
        ({"mode": "c"}, "mode", "must be one of a, b or a finite number"),
        ({"rest": 3}, "rest", "must be a section"),
        ({"names": ["a", 1]}, "names[1]", "must be text"),
        ({"names": "???"}, "names", "must be given"),
        ({"plain": {"lists": {"a": 1}}}, "plain.lists.a", "must be a list of any number, each text"),
        ({"plain": {"lists": {"a": ["b", 1]}}}, "plain.lists.a[1]", "must be text"),
        ({"plain": {"lits": {}}}, "plain.lits", ""),
        ({"plain": {"one": True}}, "plain.one", "must be one of 1, 2"),
        ({"plain": {"one": 3}}, "plain.one", "must be one of 1, 2"),
        ({"plain": {"flag": 1}}, "plain.flag", "must be true or false"),
        ({"plain": {"odd": 2}}, "plain.odd", "must be odd"),
        ({"plain": {"odd": 13}}, "plain", "13 brings bad luck"),
        ({"plain": {"small": 0}}, "plain.small", "must be greater than 0 and at most 0.5"),
        ({"plain": {"small": "1"}}, "plain.small", "must be a finite number"),
        ({"many": [float("inf")]}, "many[0]", "must be a finite number"),
        ({"rest": {1: b"x"}}, "", "must be text, numbers, lists and sections"),
        ({"required": {}}, "required.given", "must be given"),
        (3, "", "must be a section with the keys inner, many"),
    ],
)
def test_schema_names_key_and_problem(node: Any, key: str, problem: str) -> None:
    with pytest.raises(Fault) as caught:
        build(Outer, node)
    assert caught.value.key == key and caught.value.problem.startswith(problem)
    assert bool(caught.value.problem) == bool(problem)
