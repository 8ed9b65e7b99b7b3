"""A network's teacher: its moving average, run beside it segment by segment."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from framework.data.batch import Batch
from framework.local.averaging import Averaging
from framework.local.copies import follow, without_parameters
from framework.local.head import Head
from framework.local.needs import Need
from framework.local.units import Plan
from framework.network import Segment
from framework.runtime import distributed
from framework.runtime.errors import UserError


class Teacher(nn.Module):
    """Moving averages of segments, and of what heads embed with.

    The averages are buffers: in checkpoints, in no optimizer. They move at the start of a step, for the step before it,
    as whole tensors or as the slices of both that a rank has. What is due and the number of updates are
    buffers, too, so that a training which goes on from a checkpoint repeats the one that was never stopped.

    Args:
        backbone: the student.
        segments: what it was cut into.
        plan: the local units.
        names: of the plan's heads.

    Attributes:
        total: optimizer steps of the whole training, for a momentum that follows a cosine; as long as it is ``None``,
            the momentum is that of the first step.
        last: highest segment whose output a head needs.
    """

    def __init__(
        self, backbone: nn.Module, segments: Sequence[Segment], plan: Plan, names: Mapping[Head, str]
    ) -> None:
        super().__init__()
        assert plan.teacher is not None
        self.averaging: Averaging = plan.teacher
        taught = [unit for unit in plan.units if Need.TEACHER in unit.head.needs]
        self.last = max(unit.last for unit in taught)
        heads = {names[u.head]: u.head.embedder() for u in taught}
        self.backbone, self.segments, heads = copy.deepcopy((backbone, tuple(segments), heads))
        self.heads = nn.ModuleDict(heads)
        without_parameters(self)
        self._heads = {
            s: {u.head: names[u.head] for u in taught if u.last == s} for s in range(self.last + 1)
        }
        paths = {parameter: path for path, parameter in backbone.named_parameters()}
        self._paths = [[paths[p] for p in segment.parameters()] for segment in segments[: self.last + 1]]
        for unit in taught:
            self._paths[unit.last] += [
                name for name in unit.head.borrows if name not in self._paths[unit.last]
            ]
        self.total: int | None = None
        self.updates: Tensor
        self.due: Tensor
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("due", torch.zeros((), dtype=torch.float64))

    def start(self, batch: Batch) -> TeacherPass:
        """A forward pass over the batch's images, or over the last view of each."""
        one_sided = self.averaging.one_sided and batch.views > 1
        images = batch.images.chunk(batch.views)[-1] if one_sided else batch.images
        if not (self.averaging.shuffle and self.training and distributed.world_size() > 1):
            return TeacherPass(self, images)
        order = torch.randperm(len(images) * distributed.world_size(), device=images.device)
        order = distributed.from_first(order)
        everyone = distributed.gather_with_gradient(images)
        return TeacherPass(self, torch.empty_like(images).copy_(everyone[_own(order)]), order)

    @torch.no_grad()
    def after_step(self, segments: Sequence[Segment], span: Iterable[int] | None = None) -> None:
        """Move the averages if that is due.

        Args:
            segments: the student's, with the weights after the step.
            span: those of this process; by default all.

        Raises:
            UserError: weights that PyTorch's FSDP2 has sharded.
        """
        fraction = self.due * self._rate()
        for s in self._heads if span is None else self._heads.keys() & set(span):
            follow(self._pairs(segments[s].backbone, s), fraction)
        self.updates += (self.due > 0).to(self.updates.dtype)
        self.due.zero_()

    @torch.no_grad()
    def before_step(self, taken: Tensor | float) -> None:
        """Note that an optimizer step follows; ``taken`` is 0 where it is skipped."""
        self.due.fill_(taken)

    @torch.no_grad()
    def catch_up(self, segments: Sequence[Segment]) -> None:
        """Set the averages to the student's weights."""
        for s in self._heads:
            for average, weight in self._pairs(segments[s].backbone, s):
                average.copy_(weight)

    def tensors(self, s: int) -> list[Tensor]:
        """What belongs to segment ``s`` and the heads on it."""
        if s > self.last:
            return []
        modules = [*self.segments[s].modules(), *(self.heads[name] for name in self._heads[s].values())]
        return [*self.averages(s), *(buffer for module in modules for buffer in module.buffers())]

    def averages(self, s: int) -> list[Tensor]:
        """Those of segment ``s`` and of what the heads on it embed with."""
        if s > self.last:
            return []
        own = [self.backbone.get_buffer(path) for path in self._paths[s]]
        heads = {name: head.embedder() for head, name in self._heads[s].items()}
        return own + [self.heads[n].get_buffer(p) for n, m in heads.items() for p, _ in m.named_parameters()]

    def embed(self, x: Tensor, s: int) -> dict[Head, Tensor]:
        """What the averages of the heads on segment ``s`` embed its output to, by head."""
        return {h: self.heads[name](h.seen(self.segments[s], x)) for h, name in self._heads[s].items()}

    def _pairs(self, backbone: nn.Module, s: int) -> list[tuple[Tensor, Tensor]]:
        """The averages of segment ``s`` and of the heads on it, each with the student's weight."""
        pairs: list[tuple[Tensor, Tensor]]
        pairs = [(self.backbone.get_buffer(path), backbone.get_parameter(path)) for path in self._paths[s]]
        for head, name in self._heads[s].items():
            weights = dict(head.embedder().named_parameters())
            pairs += [(self.heads[name].get_buffer(path), weight) for path, weight in weights.items()]
        if any(isinstance(weight, DTensor) for _, weight in pairs):
            raise UserError("a teacher follows whole weights: use engine=fsdp in place of fully_shard")
        return pairs

    def _rate(self) -> Tensor | float:
        """1 - m."""
        rate = 1.0 - self.averaging.momentum
        if self.averaging.schedule == "constant" or self.total is None:
            return rate
        done = (self.updates.double() / self.total).clamp(max=1.0)
        return rate * (1 + torch.cos(math.pi * done)) / 2


class TeacherPass:
    """One micro-batch on its way through a teacher.

    Args:
        teacher: whose segments run.
        x: images of this rank, or the output of a segment.
        order: places, among those of all ranks, that the rows of ``x`` on all ranks were taken from; ``None`` where
            every row is at its place.
    """

    def __init__(self, teacher: Teacher, x: Tensor, order: Tensor | None = None) -> None:
        self._teacher, self.order = teacher, order
        self.x: Tensor | None = x

    def state(self) -> list[Tensor]:
        """What another process needs to go on, as arguments after ``teacher``; empty where nothing is left to do."""
        return [t for t in (self.x, self.order) if t is not None] if self.x is not None else []

    @torch.no_grad()
    def forward(self, s: int) -> dict[Head, Tensor]:
        """Run segment ``s``; embeddings (N, D) for the heads on it, by head. Its input is freed."""
        if s > self._teacher.last:
            return {}
        assert self.x is not None
        self.x = self._teacher.segments[s](self.x)
        found = self._teacher.embed(self.x, s)
        if s == self._teacher.last:
            self.x = None
        return {head: self._in_place(embeddings) for head, embeddings in found.items()}

    def _in_place(self, x: Tensor) -> Tensor:
        if self.order is None:
            return x
        return distributed.gather_with_gradient(x)[_own(self.order.argsort())]


def _own(order: Tensor) -> Tensor:
    """This rank's part."""
    return order.chunk(distributed.world_size())[distributed.rank()]
