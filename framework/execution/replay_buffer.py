"""Modules that do not wait for each other: DGL's asynchronous training as in its code, on one process.

Every module takes one turn a micro-batch. Modules share no weights, so one optimizer step after all turns
equals a step after each. What is asynchronous is the input: a module draws it from a ring of what its
predecessor has put there, which may be an older batch, and may be used again.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
from torch import Tensor, nn

from framework.data.batch import Batch
from framework.execution.step import RoutedStep


class Turns(nn.Module):
    """The rings between modules, and whose turn it is.

    Rings are no part of a checkpoint: they are emptied when one is written, and fill from the bottom again, as
    the authors' do at every drop of the learning rate. So a resumed run equals one that was never interrupted.

    Args:
        modules: number of segments.
        size: batches in a ring.
        order: of the turns: "random" or "sequence".
    """

    def __init__(self, modules: int, size: int, order: str) -> None:
        super().__init__()
        self.count, self.shuffled = modules, order == "random"
        self.rings = [Ring(size) for _ in range(modules - 1)]
        self.taken: Tensor
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))

    def take(self, step: RoutedStep) -> None:
        """One turn of every module: draw, forward, loss, gradients; then hand on."""
        fresh = step.batch
        for s in self.order():
            x, step.batch = (fresh.images, fresh) if s == 0 else self.rings[s - 1].draw()
            x = step.forward(s, x)
            step.run_heads(s)
            step.walk(s)
            if s < self.count - 1:
                self.rings[s].put(x, step.batch)
        self.taken += 1

    def order(self) -> list[int]:
        """Of the coming turns, the same on all ranks; from the bottom up as long as a ring is empty."""
        if not self.shuffled or any(not ring.entries for ring in self.rings):
            return list(range(self.count))
        return np.random.default_rng(int(self.taken)).permutation(self.count).tolist()

    def empty(self) -> None:
        """Forget what is in the rings."""
        for ring in self.rings:
            ring.entries.clear()


class Ring:
    """The newest batches of a module's predecessor.

    Args:
        size: how many.
    """

    def __init__(self, size: int) -> None:
        self.entries: deque[_Entry] = deque(maxlen=size)

    def put(self, x: Tensor, batch: Batch) -> None:
        """Add a module's detached output and the batch that it belongs to; the oldest gives way."""
        self.entries.append(_Entry(x, batch))

    def draw(self) -> tuple[Tensor, Batch]:
        """Of those used the least often the most recent one ("priority LIFO"); it stays."""
        entry = min(reversed(self.entries), key=lambda entry: entry.uses)
        entry.uses += 1
        return entry.x, entry.batch


class _Entry:
    def __init__(self, x: Tensor, batch: Batch) -> None:
        self.x, self.batch, self.uses = x, batch, 0
