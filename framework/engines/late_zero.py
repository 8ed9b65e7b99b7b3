"""ZeRO-1 and ZeRO-2 for local gradients: reduced while the next segments compute, weights gathered before their use.

As in ``late.py`` a bucket of gradients leaves when it is finished, and its weights are updated before the next forward
that uses them. Here it is reduce-scattered, so that every rank gets the sum of its own part alone; it steps that part
and all-gathers the new weights while the segment below computes. A parameter group of ZeRO is divided, flattened and
stepped as a whole, so the optimizer's groups are made to follow the buckets before ZeRO sees them.

DeepSpeed's own ways (0.19.8) hide less and send more, which is why only its partitions are used:

* ``DeepSpeedZeroOptimizer.average_tensor`` sends gradients. By ``allreduce_and_scatter``, its default, it all-reduces
  whole buckets and keeps a part, twice the bytes of a reduce-scatter; by ``allreduce_no_retain`` it makes one reduce
  for each rank. Both block: on a CPU the process, on a GPU the step's kernels. Under ``overlap_comm`` a GPU has a
  stream for them (a CPU has none), but ``average_tensor`` has the kernels wait for that stream before every bucket but
  the first, so that one is under way at most.
* Its hooks (``create_gradient_handling_hooks``) do take a small backward for every segment in the middle of a forward:
  outside of ``engine.backward`` they run ``process_gradients``, and ``run_grad_acc_post_hooks`` does nothing. But
  stage 1 without ``overlap_comm`` sends in ``reduce_gradients``, after the last backward, and so does stage 0 in
  ``buffered_allreduce_fallback``. ``no_sync`` is refused under stage 2; ``coalesce_grad_reduction`` sends at its end.
* ``DeepSpeedZeroOptimizer.step`` updates all groups and then gathers all weights in ``all_gather_dp_groups``, one
  blocking collective after the other: nothing can be left to the next step. A step for one group is there
  (``_optimizer_step``); it is that of the wrapped optimizer, which passes by partitions without a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from framework.data.batch import Batch
from framework.engines.base import Outputs, Rate, StepResult, marked, set_learning_rate
from framework.engines.buckets import Bucket, filled
from framework.engines.host_copy import Complete, Pending
from framework.execution import LocalNetwork
from framework.execution.hooks import WholeWeights
from framework.execution.uses import Use
from framework.optim import SkippableOptimizer
from framework.runtime.distributed import mean_over_ranks, new_group, world_size
from framework.runtime.errors import UserError


class PartitionWire(Protocol):
    """What exchanges the parts of flat tensors with the other ranks; each of n ranks has the n-th part."""

    def scatter(self, flat: Tensor) -> tuple[Tensor, Pending]:
        """Start to sum ``flat`` over the ranks; this rank's part of the sum."""

    def gather(self, flat: Tensor, part: Tensor) -> Pending:
        """Start to fill ``flat`` with every rank's ``part``, which is a view of this rank's part of it."""

    def close(self) -> None:
        """Free what the wire holds."""


class LateZero(WholeWeights):
    """Runs the steps of a network whose optimizer, under ZeRO-2 also whose gradients, are divided among the ranks.

    Where gradients are clipped, updates are made at the end of the step, and weights are gathered before they are used.

    Args:
        net: the network; it is given hooks.
        optimizer: of its parameters; its groups are divided where buckets end.
        partition: puts ``optimizer`` under ZeRO.
        clip: largest norm of the averaged gradient; 0 for no clipping.
        wire: to the other ranks.
        ranks: their number.
        stage: 2 has every micro-batch's gradients summed over the ranks, and only this rank's part kept, so that those
            of two groups are whole at most. 1 keeps them whole until the last micro-batch, and sends once.

    Attributes:
        zero: what ``partition`` returned.
    """

    def __init__(
        self,
        net: LocalNetwork,
        optimizer: SkippableOptimizer,
        partition: Callable[[], DeepSpeedZeroOptimizer],
        clip: float,
        wire: PartitionWire,
        ranks: int,
        stage: int,
    ) -> None:
        self._net, self._optimizer, self._clip = net, optimizer, clip
        self._wire, self._ranks, self._each = wire, ranks, stage == 2
        finishing = net.attach(self)
        _divide(optimizer, filled(finishing.order))
        self.zero = partition()
        self._groups = [_Group(self.zero, n, finishing.users) for n in range(len(optimizer.param_groups))]
        self._owner = {p: group for group in self._groups for p in group.parameters}
        self._filling: dict[_Group, Bucket] = {}
        self._scattering: dict[_Group, tuple[Tensor, Pending]] = {}
        self._gradients: dict[_Group, Tensor] = {}
        # Of the step before, and of this one; in order of their gradients.
        self._late: list[_Group] = []
        self._due: list[_Group] = []
        self._gathering: dict[_Group, Pending] = {}
        self._micro_batches, self._first, self._last = 1, True, True

    def step(self, micro_batches: list[Batch], lr: Rate) -> StepResult:
        """One optimizer step, some updates of which the next step makes."""
        outputs = Outputs()
        self._late, self._due = self._late + self._due, []
        self._micro_batches = len(micro_batches)
        for number, batch in enumerate(marked(micro_batches)):
            self._first, self._last = number == 0, batch.last
            outputs.add(self._net(batch))
        result = outputs.result()
        self._optimizer.skip = result.overflow
        set_learning_rate(self._optimizer, lr())
        if self._clip > 0:
            self._clip_and_finish(result.overflow)
        return result

    def finish(self) -> None:
        """Make all updates that are due, and have all weights."""
        self._late, self._due = self._late + self._due, []
        self._update(self._late)
        self._await(list(self._gathering))

    def close(self) -> None:
        """Make all updates, take the hooks away and close the wire."""
        self.finish()
        self._net.detach()
        self._wire.close()

    def before(self, use: Use) -> None:
        """See ``StepHooks``."""
        if use.what == "forward":
            self.before_read(use.segment)

    def lent(self, use: Use) -> AbstractContextManager[None]:
        """See ``StepHooks``."""
        self.finish()
        return nullcontext()

    def before_read(self, s: int) -> None:
        """See ``StepHooks``. The weights of the segment above are sent for; they travel while this one computes."""
        self._update([group for group in self._late if group.first_use <= s + 1])
        self._await([group for group in self._gathering if group.first_use <= s])

    def finished(self, gradients: Mapping[nn.Parameter, Tensor]) -> None:
        """See ``StepHooks``."""
        parts: dict[_Group, dict[nn.Parameter, Tensor]] = {}
        for p, gradient in gradients.items():
            parts.setdefault(self._owner[p], {})[p] = gradient
        complete = {group for group, part in parts.items() if self._fill(group, part)}
        if self._last or self._each:
            for group in (group for group in self._groups if group in complete):
                self._scatter(group)

    def _fill(self, group: _Group, part: Mapping[nn.Parameter, Tensor]) -> bool:
        """Take in gradients of a micro-batch; whether all of the group are here now."""
        if group not in self._filling:
            self._filling[group] = Bucket(group.parameters, group.weights.numel())
        return self._filling[group].add(part, 1 / self._micro_batches, self._first or self._each)

    def _scatter(self, group: _Group) -> None:
        flat = self._filling.pop(group).flat
        if self._ranks > 1:
            flat.mul_(1 / self._ranks)
        self._collect(group)
        self._scattering[group] = self._wire.scatter(flat)
        for earlier in list(self._scattering)[:-1] if self._each else ():
            self._collect(earlier)  # what travels is whole
        if self._last:
            self._due.append(group)

    def _collect(self, group: _Group) -> None:
        """Wait for this rank's part of a micro-batch's gradients, if it is under way, and add it to the others."""
        if group in self._scattering:
            part, pending = self._scattering.pop(group)
            pending.wait()
            self._gradients[group] = part.add_(self._gradients[group]) if group in self._gradients else part

    def _update(self, groups: Sequence[_Group]) -> None:
        """Step what this rank has of the groups, and send for the rest."""
        if not groups:
            return
        self._late = [group for group in self._late if group not in groups]
        for group in groups:
            self._collect(group)
            group.partition.grad = self._gradients.pop(group)
        self._optimizer.step()  # passes by the others, which have no gradient
        self._optimizer.zero_grad()
        for group in groups:
            group.part.copy_(group.partition.detach())
            self._gathering[group] = self._wire.gather(group.weights, group.part)

    def _await(self, groups: Iterable[_Group]) -> None:
        for group in groups:
            self._gathering.pop(group).wait()

    def _clip_and_finish(self, overflow: Tensor | None) -> None:
        due, self._due = self._due, []
        for group in due:
            self._collect(group)
        _clip(list(self._gradients.values()), self._clip, overflow)
        self._update(due)


class _Group:
    """One of ZeRO's parameter groups.

    Args:
        zero: whose.
        number: of the group.
        users: the lowest segment at which a step uses a parameter.

    Attributes:
        parameters: views of ``weights``, one after the other; something may follow the last.
        weights: flat.
        part: what this rank steps of ``weights``, a view.
        partition: ZeRO's own copy of it, the optimizer's only parameter of the group.
        first_use: the lowest segment that uses one of the parameters.
    """

    def __init__(self, zero: DeepSpeedZeroOptimizer, number: int, users: Mapping[nn.Parameter, int]) -> None:
        self.parameters: list[nn.Parameter] = zero.bit16_groups[number]
        self.weights: Tensor = zero.bit16_groups_flat[number]
        own = dist.get_rank(zero.real_dp_process_group[number])
        self.part: Tensor = zero.parallel_partitioned_bit16_groups[number][own]
        self.partition: Tensor = zero.single_partition_of_fp32_groups[number]
        self.first_use = min(users[p] for p in self.parameters)


def _divide(optimizer: SkippableOptimizer, buckets: Iterable[Iterable[nn.Parameter]]) -> None:
    """Divide the optimizer's groups, so that none reaches over two buckets; in the order of the buckets."""
    parts = []
    for bucket in map(set, buckets):
        own = [(group, [p for p in group["params"] if p in bucket]) for group in optimizer.param_groups]
        parts += [{**group, "params": parameters} for group, parameters in own if parameters]
    optimizer.param_groups[:] = parts


def _clip(parts: list[Tensor], largest: float, overflow: Tensor | None) -> None:
    """Bring the norm of gradients, of which every rank has other parts, down to ``largest``.

    Raises:
        UserError: it is infinite or NaN, and the step is none that is to be skipped.
    """
    squares = torch.stack(torch._foreach_norm(parts, 2, torch.float64)).square().sum()
    norm = (mean_over_ranks(squares) * world_size()).sqrt()
    if not torch.isfinite(norm) and (overflow is None or not overflow):
        raise UserError("the norm of the gradient is not finite: lower optim.lr, or check the data")
    torch._foreach_mul_(parts, (largest / (norm + 1e-6)).clamp(max=1.0).to(parts[0].dtype))


class Partitions:
    """``PartitionWire`` between all ranks.

    It has two process groups of its own, since what is sent through one goes in order: the weights of the first
    segment would wait for the gradients of the last.
    """

    def __init__(self) -> None:
        self._groups = [new_group(), new_group()] if world_size() > 1 else []

    def scatter(self, flat: Tensor) -> tuple[Tensor, Pending]:
        """See ``PartitionWire``."""
        if not self._groups:
            return flat, Complete()
        part = flat.new_empty(flat.numel() // world_size())
        work = dist.reduce_scatter_tensor(part, flat, group=self._groups[0], async_op=True)
        return part, work or Complete()

    def gather(self, flat: Tensor, part: Tensor) -> Pending:
        """See ``PartitionWire``."""
        if not self._groups:
            return Complete()
        return dist.all_gather_into_tensor(flat, part, group=self._groups[1], async_op=True) or Complete()

    def close(self) -> None:
        """See ``PartitionWire``."""
        for group in self._groups:
            dist.destroy_process_group(group)  # it has threads
