"""Sharding by segment: weights, gradients and optimizer in slices, each weight gathered once a step.

Backpropagation comes back to every segment after the whole forward pass, so that sharding gathers every weight twice,
or keeps it. A local network is done with a segment when its last window has ended, soon after the segment's forward:
then its weights are released, and its gradient is summed over the ranks while the next segments compute.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from framework.data.batch import Batch
from framework.engines.base import Outputs, Rate, StepResult, marked, set_learning_rate
from framework.engines.shard_groups import ShardGroup, shard_groups
from framework.engines.slices import Home, ShardRanks
from framework.execution import LocalNetwork
from framework.execution.uses import Use
from framework.optim import SkippableOptimizer

# Groups whose gradients are on their way, and therefore still whole.
TRAVELLING = 1


class ShardedUpdates:
    """Runs the steps of a network of which every rank has slices.

    A weight's update waits for its averaged gradient, and is made just before its next use. Where gradients are
    clipped, all of a step's gradients must be there first: then it is made at its end.

    Args:
        net: the network; it is given hooks, and its weights become slices.
        optimizer: of its parameters; it gets the slices in their place.
        clip: largest norm of the averaged gradient; 0 for no clipping.
        ranks: that share the weights.
        home: how slices are kept.
        often: whether gradients are averaged after every micro-batch, or after the last.
    """

    in_slices = True

    def __init__(
        self,
        net: LocalNetwork,
        optimizer: SkippableOptimizer,
        clip: float,
        ranks: ShardRanks,
        home: Home,
        often: bool = False,
    ) -> None:
        self._net, self._optimizer, self._clip, self._ranks = net, optimizer, clip, ranks
        net.attach(self)
        uses = net.uses()
        names = {parameter: name for name, parameter in net.named_parameters()}
        self._groups_of = shard_groups(uses, optimizer, names, ranks, home)
        self.groups = list(dict.fromkeys(group for own in self._groups_of.values() for group in own))
        self._owner = {parameter: group for group in self.groups for parameter in group.trained}
        self._order = [use for turn in uses.turns for use in turn]
        self._turn = [number for number, turn in enumerate(uses.turns) for _ in turn]
        self._next = 0  # place in the order
        self._often, self._home = often, home.device
        self._micro_batches, self._last = 1, True
        self._travelling: deque[ShardGroup] = deque()
        self._penalties: dict[nn.Parameter, Tensor] = {}

    def step(self, micro_batches: list[Batch], lr: Rate) -> StepResult:
        """One optimizer step, some updates of which the next step makes."""
        outputs = Outputs()
        self._micro_batches = len(micro_batches)
        for batch in marked(micro_batches):
            self._last = batch.last
            outputs.add(self._net(batch))
            self._release_all()
        result = outputs.result()
        overflow = result.overflow
        self._optimizer.skip = None if overflow is None else overflow.to(self._home)
        set_learning_rate(self._optimizer, lr())
        if self._clip > 0:
            self._clip_and_finish()
        return result

    def finish(self) -> None:
        """Make all updates that are due."""
        for group in self.groups:
            self._update(group)

    def close(self) -> None:
        """Make all updates, and take the hooks away; the weights stay slices."""
        self.finish()
        self._net.detach()

    def before(self, use: Use) -> None:
        """See ``StepHooks``."""
        for group in self._groups_of[use]:
            self._start(group)
        for group in self._groups_of[use]:
            group.slices.finish()
        self._gather_ahead(use)

    def after(self, use: Use) -> None:
        """See ``StepHooks``."""
        for group in self._groups_of[use]:
            group.used += 1
            if group.releases[group.used - 1]:
                group.slices.release()
            group.used %= len(group.releases)

    def before_read(self, s: int) -> None:
        """See ``StepHooks``."""
        for use in (Use("forward", s), Use("heads", s)):
            for group in self._groups_of[use]:
                self._update(group)

    @contextmanager
    def lent(self, use: Use) -> Iterator[None]:
        """See ``StepHooks``."""
        lent = [group for group in self._groups_of[use] if not group.slices.present]
        for group in lent:
            self._start(group)
        for group in lent:
            group.slices.finish()
        try:
            yield
        finally:
            for group in lent:
                group.slices.release()

    def total(self, part: Tensor) -> Tensor:
        """See ``StepHooks``."""
        return self._ranks.total(part)

    def penalized(self, gradients: Mapping[nn.Parameter, Tensor]) -> None:
        """See ``StepHooks``; every micro-batch has the same, so their average is that of the last."""
        if self._last:
            self._penalties = dict(gradients)

    def finished(self, gradients: Mapping[nn.Parameter, Tensor]) -> None:
        """See ``StepHooks``."""
        parts: dict[ShardGroup, dict[nn.Parameter, Tensor]] = {}
        for p, gradient in gradients.items():
            parts.setdefault(self._owner[p], {})[p] = gradient
        complete = {g for g, part in parts.items() if g.gradients.add(part, 1 / self._micro_batches)}
        if not (self._last or self._often):
            return
        for group in (group for group in self.groups if group in complete):
            group.gradients.start(self._last)
            self._travelling.append(group)
        while len(self._travelling) > TRAVELLING:
            self._travelling.popleft().gradients.collect()

    def _release_all(self) -> None:
        """Nothing that was gathered is used after an update, not even what was gathered ahead for nothing."""
        for group in self.groups:
            if group.slices.present or group.slices.coming:
                group.slices.release()
            group.used = 0
        self._next = 0

    def _start(self, group: ShardGroup) -> None:
        self._update(group)
        group.slices.start()

    def _gather_ahead(self, use: Use) -> None:
        """Begin to gather what the order has next, this turn or the one after it."""
        if self._order[self._next] != use:
            return  # modules that run in any order
        turn = self._turn[self._next]
        self._next = (self._next + 1) % len(self._order)
        for place in range(self._next, len(self._order)) if self._next else ():
            if self._turn[place] > turn + 1:
                return
            missing = [g for g in self._groups_of[self._order[place]] if not g.slices.present]
            for group in missing:
                self._start(group)
            if missing:
                return

    def _arrived(self, group: ShardGroup) -> bool:
        """Wait for a group's gradients, and give them to the optimizer; whether they were under way."""
        if not group.gradients.due:
            return False
        averaged = group.gradients.finish()
        for parameter in self._penalties.keys() & set(group.trained):
            group.slices.of(parameter, averaged).add_(self._penalties.pop(parameter))
        group.give(averaged)
        return True

    def _update(self, group: ShardGroup) -> None:
        if self._arrived(group):
            self._apply()

    def _clip_and_finish(self) -> None:
        arrived = [group for group in self.groups if self._arrived(group)]
        _clip([flat for group in arrived for flat in group.flats.values()], self._clip, self._ranks)
        self._apply()

    def _apply(self) -> None:
        """Step the optimizer, which passes by parameters without a gradient."""
        self._optimizer.step()
        self._optimizer.zero_grad()


def _clip(flats: list[nn.Parameter], largest: float, ranks: ShardRanks) -> None:
    """As ``torch.nn.utils.clip_grad_norm_`` for the whole gradients."""
    gradients = [flat.grad for flat in flats if flat.grad is not None]
    squares = torch.stack(torch._foreach_norm(gradients, 2, torch.float64)).square().sum()
    norm = ranks.total(squares).sqrt().to(gradients[0].dtype)
    torch._foreach_mul_(gradients, (largest / (norm + 1e-6)).clamp(max=1.0))
