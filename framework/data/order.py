"""Which sample a step shows where: pure functions of (seed, step, rank)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_ORDER_STREAM = 0  # second word of the Philox key; views use 1
_SPARES = 100  # positions tried in place of a broken image


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """[n] int64, the sample at every position of an epoch; the same on every machine and version of numpy."""
    bits = np.random.Philox(key=[seed, _ORDER_STREAM], counter=[0, 0, epoch, 0]).random_raw(n)
    return bits.argsort(kind="stable")


class Job(NamedTuple):
    """One batch of one rank, to be decoded.

    Attributes:
        epoch: keys the views.
        first: position of the first sample in the epoch; keys the views.
        size: number of samples.
        samples: [size + spares] sample numbers at ``first`` and after; a broken image gives way to the next
            that is whole among the ``spares`` that follow it.
    """

    epoch: int
    first: int
    size: int
    samples: np.ndarray


class TrainJobs:
    """The jobs of ``steps`` for one rank; iterated anew for every call of ``TrainLoader.steps``."""

    def __init__(
        self, n: int, batch_size: int, accumulation: int, rank: int, world_size: int, seed: int
    ) -> None:
        self.n, self.batch_size, self.accumulation = n, batch_size, accumulation
        self.rank, self.seed = rank, seed
        self.micro_batch = batch_size // accumulation
        self.count = self.micro_batch // world_size
        self.steps = range(0)

    def __iter__(self) -> Iterator[Job]:
        epoch, order = -1, np.empty(0, np.int64)
        for step in self.steps:
            now, step_in_epoch = divmod(step, self.n // self.batch_size)
            if now != epoch:
                epoch, order = now, epoch_order(self.n, self.seed, now)
            for micro in range(self.accumulation):
                first = step_in_epoch * self.batch_size + micro * self.micro_batch + self.rank * self.count
                samples = order.take(range(first, first + self.count + _SPARES), mode="wrap")
                yield Job(epoch, first, self.count, samples)


def eval_jobs(n: int, batch_size: int, rank: int, world_size: int) -> list[Job]:
    batches = min(-(-n // (batch_size * world_size)), n // world_size)
    parts = np.array_split(np.arange(n), batches * world_size)[rank::world_size]
    return [Job(0, int(part[0]), len(part), part) for part in parts]
