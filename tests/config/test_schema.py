"""Dictionaries into dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from framework.config.schema import Fault, Fraction, PositiveInt, build, keys


@dataclass
class Inner:
    ratio: Fraction = 0.5
    pair: tuple[int, str] = (1, "a")


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)
    many: tuple[float, ...] = ()
    count: PositiveInt | None = None
    mode: Literal["a", "b"] | float = "a"
    rest: dict[str, Any] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)


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
        (3, "", "must be a section with the keys inner, many"),
    ],
)
def test_schema_names_key_and_problem(node: Any, key: str, problem: str) -> None:
    with pytest.raises(Fault) as caught:
        build(Outer, node)
    assert caught.value.key == key and caught.value.problem.startswith(problem)
    assert bool(caught.value.problem) == bool(problem)
