"""Which sample a step shows where: pure functions of (seed, step, rank)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_ORDER_STREAM = 0  # second word of the Philox key; views use 1
_SPARES = 100  # positions tried in place of a broken image
AHEAD = 4  # shards named to a worker before their first sample is due


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """(n,) int64, the sample at every position of an epoch; the same on every machine and version of numpy."""
    return _random(n, seed, epoch, 0).argsort(kind="stable")


def windowed_order(sizes: np.ndarray, window: int, seed: int, epoch: int) -> np.ndarray:
    """(n,) int64, an order that touches few shards at a time.

    Shards are put in a row at random; each sample then moves back by a random distance of less than
    ``window`` samples. Any two neighbors of a shard end up about ``window / 3`` positions apart, and between
    the first and the last sample of a shard lie fewer than 2 * window + the largest shard.

    Args:
        sizes: (shards,) samples of each shard; samples are numbered shard by shard.
        window: in samples.
    """
    row = _random(len(sizes), seed, epoch, 1).argsort(kind="stable")
    start = np.empty(len(sizes), np.int64)
    start[row] = np.cumsum(sizes[row]) - sizes[row]
    distance = _random(int(sizes.sum()), seed, epoch, 0) >> np.uint64(11)
    return (np.repeat(start, sizes) + distance * (2.0**-53 * window)).argsort(kind="stable")


def balanced(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Ascending numbers of ``fraction`` of the samples of every class, at least one each.

    A smaller fraction with the same seed is part of a larger one.

    Args:
        labels: (n,) class of every sample.
        fraction: above 0, up to 1.
        seed: picks the samples.
    """
    mixed = epoch_order(len(labels), seed, 0)
    by_class = mixed[labels[mixed].argsort(kind="stable")]
    counts = np.unique(labels, return_counts=True)[1]
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    wanted = np.maximum(1, np.rint(fraction * counts)).astype(np.int64)
    return np.sort(by_class[rank < np.repeat(wanted, counts)])


def _random(n: int, seed: int, epoch: int, stream: int) -> np.ndarray:
    philox = np.random.Philox(key=[seed, _ORDER_STREAM], counter=[0, 0, epoch, stream])
    return np.asarray(philox.random_raw(n))


class Job(NamedTuple):
    """One batch of one rank, to be decoded.

    Attributes:
        epoch: keys the views.
        first: position of the first sample in the epoch; keys the views.
        size: number of samples.
        samples: (size + spares,) sample numbers at ``first`` and after; a broken image gives way to the next
            that is whole among the ``spares`` that follow it.
        ahead: shards that will be needed next.
    """

    epoch: int
    first: int
    size: int
    samples: np.ndarray
    ahead: tuple[int, ...] = ()


class TrainJobs:
    """The jobs of ``steps`` for one rank; iterated anew for every call of ``TrainLoader.steps``.

    Args:
        shard: (n,) shard of every sample, ascending.
        window: of ``windowed_order``; 0 for ``epoch_order``.
    """

    def __init__(
        self,
        shard: np.ndarray,
        batch_size: int,
        accumulation: int,
        rank: int,
        world_size: int,
        seed: int,
        window: int = 0,
    ) -> None:
        self.shard, self.batch_size, self.accumulation = shard, batch_size, accumulation
        self.rank, self.seed, self.window = rank, seed, window
        self.micro_batch = batch_size // accumulation
        self.count = self.micro_batch // world_size
        self.steps = range(0)

    def __iter__(self) -> Iterator[Job]:
        epoch = -1
        for step in self.steps:
            now, step_in_epoch = divmod(step, len(self.shard) // self.batch_size)
            if now != epoch:
                epoch, order = now, self._order(now)
                ahead = Ahead(self.shard[order]) if self.window else None
            for micro in range(self.accumulation):
                first = step_in_epoch * self.batch_size + self.offset(micro)
                samples = order.take(range(first, first + self.count + _SPARES), mode="wrap")
                yield Job(epoch, first, self.count, samples, ahead.at(first + self.count) if ahead else ())

    def offset(self, micro: int) -> int:
        """Of a micro-batch's first image on this rank from the first of the step."""
        return micro * self.micro_batch + self.rank * self.count

    def _order(self, epoch: int) -> np.ndarray:
        if self.window:
            return windowed_order(np.bincount(self.shard), self.window, self.seed, epoch)
        return epoch_order(len(self.shard), self.seed, epoch)


class Ahead:
    """Which shards come next, by the position of their first sample; ``shards`` (n,) is in order of use."""

    def __init__(self, shards: np.ndarray) -> None:
        names, first = np.unique(shards, return_index=True)
        by_use = first.argsort()
        self._names, self._first = names[by_use], first[by_use]

    def at(self, position: int) -> tuple[int, ...]:
        due = int(np.searchsorted(self._first, position))
        return tuple(self._names[due : due + AHEAD].tolist())


def eval_jobs(shard: np.ndarray, batch_size: int, rank: int, world_size: int) -> list[Job]:
    """Every sample once over all ranks, in equally many jobs on each; ``shard`` as in ``TrainJobs``."""
    n = len(shard)
    batches = min(-(-n // (batch_size * world_size)), n // world_size)
    parts = np.array_split(np.arange(n), batches * world_size)[rank::world_size]
    ahead = Ahead(shard)
    return [Job(0, int(part[0]), len(part), part, ahead.at(int(part[-1]) + 1)) for part in parts]
