"""Modules that do not wait for each other: DGL's asynchronous training as in its code, on one process.

Every module runs once a micro-batch, in any order. Modules share no weights, so one optimizer step after all have
run equals a step after each. What is asynchronous is the input: a module draws it from a buffer of its predecessor's
latest outputs, so it may belong to an older batch, and may be used again.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
from torch import Tensor, nn

from framework.config.method_options import Execution
from framework.data.batch import Batch
from framework.execution.step import RoutedStep


class ReplayBufferStrategy(nn.Module):
    """Runs the segments of a step on inputs from replay buffers.

    Replay buffers are no part of a checkpoint: they are emptied when one is written, and fill from the first module
    on again, as the authors' do at every drop of the learning rate. So a resumed run equals one that was never
    interrupted.

    Args:
        modules: number of segments.
        execution: size of the buffers, and the order in which the modules run.

    Attributes:
        taken: micro-batches so far; part of a checkpoint, under this name.
    """

    def __init__(self, modules: int, execution: Execution) -> None:
        super().__init__()
        self.count, self.shuffled = modules, execution.buffer_order == "random"
        self.outputs = [ReplayBuffer(execution.buffer_size) for _ in range(modules - 1)]
        self.taken: Tensor
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))
        self._know(0)

    def run(self, step: RoutedStep) -> None:
        """Every module once: draw an input, forward, losses, gradients; then store the output for the next module."""
        fresh = step.batch
        for s in self.order():
            x, step.batch = (fresh.images, fresh) if s == 0 else self.outputs[s - 1].draw()
            x = step.forward(s, x)
            step.run_heads(s)
            step.walk(s)
            if s < self.count - 1:
                self.outputs[s].put(x, step.batch)
        before = self._known()
        self.taken += 1
        if before is not None:
            self._know(before + 1)

    def order(self) -> list[int]:
        """Order of the modules in the coming step, the same on all ranks; from the first up while a buffer is empty."""
        if not self.shuffled or any(not buffer.entries for buffer in self.outputs):
            return list(range(self.count))
        return np.random.default_rng(self._done()).permutation(self.count).tolist()

    def _done(self) -> int:
        """``taken``, which the host reads only where somebody else has written it: when it was loaded or moved."""
        if (known := self._known()) is None:
            self._know(known := int(self.taken))
        return known

    def _know(self, number: int) -> None:
        self._seen = (self.taken, self.taken._version, number)

    def _known(self) -> int | None:
        tensor, version, number = self._seen
        return number if self.taken is tensor and self.taken._version == version else None

    def clear(self) -> None:
        """Empty the buffers."""
        for buffer in self.outputs:
            buffer.entries.clear()


class ReplayBuffer:
    """The newest outputs of a module, with their batches.

    Args:
        size: how many.
    """

    def __init__(self, size: int) -> None:
        self.entries: deque[_Entry] = deque(maxlen=size)

    def put(self, x: Tensor, batch: Batch) -> None:
        """Add a module's detached output and the batch that it belongs to; a full buffer drops its oldest."""
        self.entries.append(_Entry(x, batch))

    def draw(self) -> tuple[Tensor, Batch]:
        """The newest of those used least often ("priority LIFO" in the authors' code), which stays in the buffer."""
        entry = min(reversed(self.entries), key=lambda entry: entry.uses)
        entry.uses += 1
        return entry.x, entry.batch


class _Entry:
    def __init__(self, x: Tensor, batch: Batch) -> None:
        self.x, self.batch, self.uses = x, batch, 0
