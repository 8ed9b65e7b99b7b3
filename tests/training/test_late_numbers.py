"""What the host reads of a step, and how ranks agree on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from framework.engines import StepResult
from framework.runtime.distributed import rank
from framework.runtime.requests import Request
from framework.training.late_numbers import LateNumbers, most_urgent
from tests.support.host_reads import META, no_host_reads
from tests.support.pool import Pool

PoolOf = Callable[[int], Pool]
ASKED = (Request.SAVE, Request.NOTHING)  # of two ranks


def agreed() -> list[object]:
    """Steps that are written, that nobody looks at, that are NaN on the second rank, that are skipped."""
    share = torch.tensor([1.0, 2.0]) * (1 + rank())
    broken = share * torch.tensor([1.0, math.nan if rank() else 1.0])
    no, yes = torch.tensor(False), torch.tensor(True)
    steps = [
        LateNumbers(StepResult(share), ASKED[rank()], written=True),
        LateNumbers(StepResult(share, no), Request.NOTHING, written=False),
        LateNumbers(StepResult(broken), Request.NOTHING, written=False),
        LateNumbers(StepResult(share, yes, torch.tensor([False, True])), Request.NOTHING, written=False),
    ]
    found: list[object] = [
        (numbers.request(), numbers.skipped(), numbers.hopeless(), str(numbers.losses())) for numbers in steps
    ]
    return [*found, most_urgent(ASKED[rank()])]


def test_ranks_agree_and_losses_are_summed_where_somebody_looks(pool: PoolOf) -> None:
    expected = [
        (Request.SAVE, False, [], "[3.0, 6.0]"),
        (Request.NOTHING, False, [], "None"),
        (Request.NOTHING, False, [], "[3.0, nan]"),
        (Request.NOTHING, True, [1], "[3.0, 6.0]"),
        Request.SAVE,
    ]
    assert pool(2).run(agreed) == [expected, expected]


@pytest.mark.parametrize(("written", "exchanged"), [(False, [5]), (True, [2, 5])])
def test_losses_travel_only_where_they_are_written(
    monkeypatch: pytest.MonkeyPatch, written: bool, exchanged: list[int]
) -> None:
    """Request, not finite, skipped and two units are exchanged in any case, by one collective."""
    sizes: list[int] = []

    def counted(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(x.numel())
        return all_reduce(x, *args, **kwargs)

    all_reduce = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", counted)
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        no = torch.tensor(False)
        LateNumbers(StepResult(torch.ones(2), no, no.expand(2)), Request.NOTHING, written).losses()
    finally:
        dist.destroy_process_group()
    assert sizes == exchanged


def test_nothing_is_read_before_it_is_asked_for() -> None:
    losses, flag = torch.zeros(2, device=META), torch.zeros((), dtype=torch.bool, device=META)
    with no_host_reads():
        numbers = LateNumbers(StepResult(losses, flag, flag.expand(2)), Request.SAVE, written=True)
        unskippable = LateNumbers(StepResult(losses), Request.NOTHING, written=False)
        assert not unskippable.skipped()
    for read in (numbers.skipped, numbers.request, numbers.losses, unskippable.losses):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read()
