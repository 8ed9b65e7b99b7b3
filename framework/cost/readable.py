"""Bytes and FLOPs in units that can be read."""

from __future__ import annotations

from collections.abc import Sequence

Units = tuple[tuple[float, str], ...]
BYTES: Units = ((2**20, "MiB"), (2**30, "GiB"))
FLOPS: Units = ((1e9, "GFLOP"), (1e12, "TFLOP"))  # a multiply-add is two


def column(numbers: Sequence[float], units: Units) -> tuple[str, list[str]]:
    """One unit for all ``numbers``, the largest in which the largest of them is at least 1, and each in that unit."""
    size, name = next((unit for unit in reversed(units) if max(numbers) >= unit[0]), units[0])
    return name, [f"{number / size:,.2f}" for number in numbers]


def text(number: float, units: Units) -> str:
    """``number`` with its unit, such as ``1.50 GiB``."""
    name, (value,) = column([number], units)
    return f"{value} {name}"
