"""Which segments a stage gets."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.pipeline.scheduling.placement import Placement, balanced, listed
from framework.runtime.errors import UserError


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.data())
def test_the_dearest_stage_is_as_cheap_as_can_be(costs: list[int], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    placement = balanced(costs, stages)

    def dearest(bounds: tuple[int, ...]) -> int:
        return max(sum(costs[a:b]) for a, b in pairwise(bounds))

    def splits(start: int, parts: int) -> Iterator[tuple[int, ...]]:
        if parts == 1:
            yield (start, len(costs))
            return
        for stop in range(start + 1, len(costs) - parts + 2):
            yield from ((start, *rest) for rest in splits(stop, parts - 1))

    assert placement.stages == stages
    assert [s for k in range(stages) for s in placement.span(k)] == list(range(len(costs)))
    assert all(placement.stage_of(s) == k for k in range(stages) for s in placement.span(k))
    assert dearest(placement.bounds) == min(dearest(bounds) for bounds in splits(0, stages))


def test_stages_that_are_impossible() -> None:
    with pytest.raises(UserError, match=r"pipeline.stages=5: the network has 4 segments"):
        balanced([1.0] * 4, 5)
    assert listed([1, 3], 4, 2) == Placement((0, 1, 4))
    for wrong in ([1, 2], [4], [1, 1, 2], [0, 4]):
        with pytest.raises(UserError, match=r"pipeline.balance=.*4 in all"):
            listed(wrong, 4, 2)
