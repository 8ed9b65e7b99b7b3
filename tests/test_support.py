"""What other tests rely on without looking."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from tests.support.pairwise import pairwise_cover


@pytest.mark.parametrize("sizes", [(2, 2), (14, 3, 3, 3), (6, 3, 2, 3, 2), (1, 4), (3, 3, 3, 3)])
def test_a_pairwise_cover_holds_every_pair_and_is_small(sizes: tuple[int, ...]) -> None:
    rows = pairwise_cover(*map(range, sizes))
    for (i, one), (j, other) in combinations(enumerate(sizes), 2):
        assert {(row[i], row[j]) for row in rows} == set(product(range(one), range(other)))
    *_, second, largest = sorted(sizes)
    assert second * largest <= len(rows) <= 1.5 * second * largest
