"""Few combinations of many options, in which every two values of different options still meet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations, product
from typing import Any


def pairs(row: Sequence[Any]) -> set[tuple[int, Any, int, Any]]:
    """Every two values of a row, with the numbers of their options."""
    return {(i, row[i], j, row[j]) for i, j in combinations(range(len(row)), 2)}


def pairwise_cover(*options: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows of one value of each option that hold every pair of values of every two options, the same each time.

    Greedy: the next row holds most pairs that no row has yet, and among such rows the pairs that were used least.
    """
    numbers = [range(len(values)) for values in options]
    missing = set().union(*map(pairs, product(*numbers)))
    used: Counter[tuple[int, Any, int, Any]] = Counter()
    rows = []
    while missing:
        row = max(
            product(*numbers),
            key=lambda row: (len(pairs(row) & missing), -sum(used[pair] for pair in pairs(row))),
        )
        missing -= pairs(row)
        used.update(pairs(row))
        rows.append(tuple(values[number] for values, number in zip(options, row, strict=True)))
    return rows
