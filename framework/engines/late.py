"""Data parallelism for local gradients: averaged while the next segments compute, applied when they are needed.

A local network has finished a segment's gradient long before the step ends, so its bucket is averaged over the ranks
meanwhile. Backpropagation ends with the smallest segments, local learning with the largest, whose averages would
outlast the step. But the next step begins with segment 0: a bucket is waited for, and its weights are updated, just
before the next forward that uses them. No weight is ever used stale, and the numbers are those of updates at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch.distributed as dist
from torch import Tensor, nn

from framework.data.batch import Batch
from framework.engines.base import Outputs, Rate, StepResult, marked, set_learning_rate
from framework.engines.buckets import Bucket, filled
from framework.engines.host_copy import Complete, Pending
from framework.execution import LocalNetwork
from framework.execution.hooks import WholeWeights
from framework.execution.uses import Use
from framework.optim import SkippableOptimizer
from framework.runtime.distributed import new_group, world_size


class Wire(Protocol):
    """What sums tensors over the ranks."""

    def sum(self, x: Tensor) -> Pending:
        """Start to sum ``x`` over the ranks, in place."""

    def close(self) -> None:
        """Free what the wire holds."""


class LateUpdates(WholeWeights):
    """Runs the steps of a network whose weights, gradients and optimizer are whole on every rank.

    Where gradients are clipped, all of a step's gradients must be there first: then the update is made at the end of
    the step, and only what is averaged earlier is hidden. A step that is to be skipped is known as such at its end,
    before any of its updates.

    Args:
        net: the network; it is given hooks.
        optimizer: of its parameters; what it does to one must not depend on the others.
        clip: largest norm of the averaged gradient; 0 for no clipping.
        wire: to the other ranks.
        ranks: their number.
    """

    def __init__(
        self, net: LocalNetwork, optimizer: SkippableOptimizer, clip: float, wire: Wire, ranks: int
    ) -> None:
        self._net, self._optimizer, self._clip = net, optimizer, clip
        self._wire, self._ranks = wire, ranks
        finishing = net.attach(self)
        self._buckets = [Bucket(parameters) for parameters in filled(finishing.order)]
        self._owner = {p: bucket for bucket in self._buckets for p in bucket.views}
        self._used: dict[int, list[Bucket]] = {}
        for p, bucket in self._owner.items():
            users = self._used.setdefault(finishing.users[p], [])
            if bucket not in users:
                users.append(bucket)
        self._travelling: dict[Bucket, Pending] = {}
        self._micro_batches, self._first, self._last = 1, True, True

    def step(self, micro_batches: list[Batch], lr: Rate) -> StepResult:
        """One optimizer step, some updates of which the next step makes."""
        outputs = Outputs()
        self._micro_batches = len(micro_batches)
        for number, batch in enumerate(marked(micro_batches)):
            self._first, self._last = number == 0, batch.last
            outputs.add(self._net(batch))
        result = outputs.result()
        self._optimizer.skip = result.overflow
        set_learning_rate(self._optimizer, lr())
        if self._clip > 0:
            self._clip_and_finish()
        return result

    def finish(self) -> None:
        """Make all updates that are due."""
        for bucket in list(self._travelling):
            self._update(bucket)

    def close(self) -> None:
        """Make all updates, take the hooks away and close the wire."""
        self.finish()
        self._net.detach()
        self._wire.close()

    def before(self, use: Use) -> None:
        """See ``StepHooks``."""
        if use.what == "forward":
            self.before_read(use.segment)

    def before_read(self, s: int) -> None:
        """See ``StepHooks``."""
        for bucket in self._used.get(s, ()):
            self._update(bucket)

    def lent(self, use: Use) -> AbstractContextManager[None]:
        """See ``StepHooks``."""
        self.finish()
        return nullcontext()

    def finished(self, gradients: Mapping[nn.Parameter, Tensor]) -> None:
        """See ``StepHooks``."""
        parts: dict[Bucket, dict[nn.Parameter, Tensor]] = {}
        for p, gradient in gradients.items():
            parts.setdefault(self._owner[p], {})[p] = gradient
        complete = {b for b, part in parts.items() if b.add(part, 1 / self._micro_batches, self._first)}
        if self._last:
            for bucket in (bucket for bucket in self._buckets if bucket in complete):
                if self._ranks > 1:
                    bucket.flat.mul_(1 / self._ranks)
                self._travelling[bucket] = self._wire.sum(bucket.flat)

    def _arrived(self, bucket: Bucket) -> bool:
        """Wait for a bucket; whether it was under way."""
        if bucket not in self._travelling:
            return False
        self._travelling.pop(bucket).wait()
        return True

    def _update(self, bucket: Bucket) -> None:
        if self._arrived(bucket):
            _give(bucket)
            self._apply()

    def _clip_and_finish(self) -> None:
        for bucket in self._buckets:
            if self._arrived(bucket):
                _give(bucket)
        nn.utils.clip_grad_norm_(self._net.parameters(), self._clip)
        self._apply()

    def _apply(self) -> None:
        """Step the optimizer, which passes by parameters without a gradient."""
        self._optimizer.step()
        self._optimizer.zero_grad()


def _give(bucket: Bucket) -> None:
    for p, gradient in bucket.views.items():
        p.grad = gradient


class Ranks:
    """``Wire`` between all ranks: a process group of its own, in which no other exchange waits for gradients."""

    def __init__(self) -> None:
        self._group = new_group() if world_size() > 1 else None

    def sum(self, x: Tensor) -> Pending:
        """See ``Wire``."""
        work = dist.all_reduce(x, group=self._group, async_op=True) if self._group is not None else None
        return work or Complete()

    def close(self) -> None:
        """See ``Wire``."""
        if self._group is not None:
            dist.destroy_process_group(self._group)  # it has threads
