"""Markers on some of a test's parameters: in the default run a test has few, and all of them among the long ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow(values: Iterable[Any]) -> list[Any]:
    """Values of a parameter, or rows of several, with which a test is one of the long ones."""
    return _marked(values, pytest.mark.slow)


def soak(values: Iterable[Any]) -> list[Any]:
    """Values of a parameter, or rows of several, with which a test is left to ``-m soak``."""
    return _marked(values, pytest.mark.soak)


def _marked(values: Iterable[Any], marker: pytest.MarkDecorator) -> list[Any]:
    rows = (value if isinstance(value, tuple) else (value,) for value in values)
    return [pytest.param(*row, marks=marker) for row in rows]
