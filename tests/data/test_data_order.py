"""The order with a bounded read window: how far neighbors end up apart, how few shards are in use."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.data.loading.sample_order import AHEAD, TrainJobs, eval_jobs, windowed_order

SIZES = np.full(100, 200)
WINDOW = 2000


def positions(sizes: np.ndarray, window: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    """Where each sample comes."""
    return windowed_order(sizes, window, seed, epoch).argsort()


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=20),
    window=st.integers(1, 400),
    epoch=st.integers(0, 3),
)
def test_shards_of_any_size_are_used_for_a_bounded_time(sizes, window, epoch):
    found = positions(np.array(sizes), window, epoch=epoch)
    assert sorted(found) == list(range(sum(sizes)))
    for shard in np.split(found, np.cumsum(sizes)[:-1]):
        assert shard.max() - shard.min() < 2 * window + max(sizes)


def test_order_is_by_seed_and_epoch():
    orders = [windowed_order(SIZES, WINDOW, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert len({order.tobytes() for order in orders}) == 3
    assert np.array_equal(orders[1], windowed_order(SIZES, WINDOW, 0, 1))
    assert windowed_order(np.array([3, 2, 3]), 4, 0, 0).tolist() == [
        5,
        0,
        2,
        6,
        7,
        1,
        4,
        3,
    ]  # on every machine


def test_neighbors_of_a_shard_end_up_far_apart():
    shards = positions(SIZES, WINDOW).reshape(100, 200)
    apart = np.abs(np.diff(shards, axis=1))
    assert apart.mean() == pytest.approx(WINDOW / 3, rel=0.05)
    assert (apart == 1).mean() < 3 / WINDOW
    batches = shards // 200  # in batches of 200, images of one shard are spread over the batches of a window
    share = [np.unique(batch, return_counts=True)[1].max() for batch in batches[20:80]]
    assert np.median(share) < 40


def test_shards_come_in_an_order_of_their_own():
    starts = positions(SIZES, WINDOW).reshape(100, 200).min(1)
    correlation = np.corrcoef(starts, np.arange(100))[0, 1]
    assert abs(correlation) < 0.35
    again = positions(SIZES, WINDOW, epoch=1).reshape(100, 200).min(1)
    assert abs(np.corrcoef(starts, again)[0, 1]) < 0.35


def test_few_shards_are_in_use_at_a_time():
    shards = positions(SIZES, WINDOW).reshape(100, 200)
    in_use = [((shards.min(1) <= at) & (shards.max(1) >= at)).sum() for at in range(0, 20000, 100)]
    assert max(in_use) <= WINDOW // 200 + 1


def test_jobs_name_the_shards_that_come_next():
    shard = np.repeat(np.arange(30), 40).astype(np.int32)
    jobs = TrainJobs(shard, 60, 1, 0, 1, seed=0, window=100)
    jobs.steps = range(20)
    used: set[int] = set()
    named: list[set[int]] = []
    for job in jobs:
        new = set(shard[job.samples[: job.size]].tolist()) - used
        assert len(job.ahead) <= AHEAD
        if len(named) >= 2:  # but for those of the first moment
            assert new <= set().union(*named)
        used |= new
        named.append(set(job.ahead))
    assert used == set(range(30))


def test_evaluation_names_the_shards_that_come_next():
    jobs = eval_jobs(np.repeat(np.arange(6), 10), 10, 0, 1)
    assert [job.ahead for job in jobs] == [(1, 2, 3, 4), (2, 3, 4, 5), (3, 4, 5), (4, 5), (5,), ()]
