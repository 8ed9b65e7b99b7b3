"""Teachers and the objectives that need one, against formulas with the whole network run twice, in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from framework.data.batch import Batch
from framework.execution import LocalNetwork
from framework.local import LocalUnit, Plan
from framework.local.averaging import Averaging
from framework.local.head import Head
from framework.local.heads import Projection
from framework.local.methods import gim, loco, simclr
from framework.local.needs import Need
from framework.local.teacher_objectives import MoCo
from framework.model import local_network
from framework.runtime.distributed import rank
from framework.runtime.errors import UserError
from tests.support.marks import slow

METHODS: dict[str, Any] = {"simclr": simclr, "gim": gim, "loco": loco}
IMAGES, STEPS, LR, QUEUE = 6, 4, 0.1, 15  # the queue goes round after two steps and a half


def network(method: str, objective: str, **head: Any) -> LocalNetwork:
    torch.manual_seed(0)
    sizes = {"proj_hidden": 16, "dim": 8, "pred_hidden": 5, "queue": QUEUE}
    options = METHODS[method].Options(head=Projection(objective=objective, **{**sizes, **head}))
    return local_network("resnet8", method, options, image_size=16).double().train()


def batch(step: int) -> Batch:
    """Two noisy copies of blobs of color."""
    generator = torch.Generator().manual_seed(step)
    blobs = torch.randn(1, IMAGES, 3, 4, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, IMAGES, 3, 16, 16, generator=generator, dtype=torch.float64)
    images = blobs.repeat_interleave(4, 3).repeat_interleave(4, 4) + 0.3 * noise
    return Batch(images.flatten(0, 1), None, 2)


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(1, keepdim=True).sqrt()


def moco(z: Tensor, k: Tensor, head: Any, queue: Tensor) -> Tensor:
    q, k = unit(z), unit(k)
    losses = []
    for i in range(IMAGES):
        positive = torch.exp((q[i] * k[i]).sum() / 0.2)
        negatives = sum(torch.exp((q[i] * n).sum() / 0.2) for n in queue)
        losses.append(-torch.log(positive / (positive + negatives)))
    return torch.stack(losses).mean()


def moco_both(z: Tensor, k: Tensor, head: Any, queue: Tensor) -> Tensor:
    (z1, z2), (k1, k2) = z.chunk(2), k.chunk(2)
    return (moco(z1, k2, head, queue) + moco(z2, k1, head, queue)) / 2


def mocov3(z: Tensor, k: Tensor, head: Any, queue: Tensor) -> Tensor:
    (q1, q2), (k1, k2) = unit(head.predictor(z)).chunk(2), unit(k).chunk(2)
    losses = []
    for q, keys in ((q1, k2), (q2, k1)):
        exponentials = torch.exp(q @ keys.T / 1.0)
        losses.append(-torch.log(exponentials.diagonal() / exponentials.sum(1)).mean() * 2 * 1.0)
    return losses[0] + losses[1]


def byol(z: Tensor, k: Tensor, head: Any, queue: Tensor) -> Tensor:
    (p1, p2), (k1, k2) = unit(head.predictor(z)).chunk(2), unit(k).chunk(2)
    return sum((p - t).square().sum(1).mean() for p, t in ((p1, k2), (p2, k1)))  # type: ignore[return-value]


def byol_one_sided(z: Tensor, k: Tensor, head: Any, queue: Tensor) -> Tensor:
    return (unit(head.predictor(z)) - unit(k)).square().sum(1).mean()


def simsiam(z: Tensor, k: Tensor, head: Any, queue: Tensor) -> Tensor:
    (p1, p2), (z1, z2) = unit(head.objective.predictor(z)).chunk(2), unit(z.detach()).chunk(2)
    return -((p1 * z2).sum(1).mean() / 2 + (p2 * z1).sum(1).mean() / 2)


Formula = Callable[[Tensor, Tensor, Any, Tensor], Tensor]
#: objective, form, formula, momentum, cosine
CASES: dict[str, tuple[str, str | None, Formula, float, bool]] = {
    "moco": ("moco", None, moco, 0.999, False),
    "moco-both": ("moco", "symmetric", moco_both, 0.999, False),
    "mocov3": ("mocov3", None, mocov3, 0.99, True),
    "byol": ("byol", None, byol, 0.996, True),
    "byol-one-sided": ("byol", "one_sided", byol_one_sided, 0.996, True),
    "simsiam": ("simsiam", None, simsiam, 1.0, False),
}


class Reference:
    """The definition: every window and the teacher below it run from the images on, by autograd alone."""

    def __init__(self, net: LocalNetwork, case: str) -> None:
        self.objective, self.form, self.formula, self.momentum, self.cosine = CASES[case]
        self.student, self.teacher = copy.deepcopy(net), copy.deepcopy(net)
        self.queues = (
            [u.head.objective.queue for u in self.student.plan.units] if self.objective == "moco" else []
        )
        self.step = 0

    def advance(self, data: Batch) -> list[float]:
        views = data.images.chunk(2)
        one_sided = self.form == "one_sided" or (self.objective == "moco" and self.form is None)
        own, other = (views[0], views[1]) if one_sided else (data.images, data.images)
        losses, entering = [], []
        for number, u in enumerate(self.student.plan.units):
            z = self._embedding(self.student, number, own, u.first)
            with torch.no_grad():
                k = self._embedding(self.teacher, number, other, 0)
            queue = self.queues[number] if self.queues else torch.empty(0)
            loss = self.formula(z, k, u.head, queue)
            loss.backward()
            losses.append(float(loss))
            keys = unit(k)
            entering.append(keys if one_sided else torch.stack(keys.chunk(2), 1).flatten(0, 1))
        with torch.no_grad():
            for p in self.student.parameters():
                if p.grad is not None:
                    p -= LR * p.grad
                    p.grad = None
            self._follow()
            for queue, keys in zip(self.queues, entering, strict=False):
                for row, key in enumerate(keys):
                    queue[(self.step * len(keys) + row) % QUEUE] = key
        self.step += 1
        return losses

    def _embedding(self, net: LocalNetwork, number: int, x: Tensor, first: int) -> Tensor:
        u = net.plan.units[number]
        for s in range(u.last + 1):
            x = net.segments[s](x.detach() if s == first else x)
        return u.head.trunk(x)  # type: ignore[operator]

    def _follow(self) -> None:
        m = self.momentum
        if self.cosine:
            m = 1 - (1 - m) * (1 + math.cos(math.pi * self.step / STEPS)) / 2
        for mine, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            mine.copy_(m * mine + (1 - m) * theirs)


def train(net: LocalNetwork, steps: range) -> list[list[float]]:
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    history = []
    for step in steps:
        output = net(batch(step))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(output.unit_losses.tolist())
    return history


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("case", "method"),
    [
        *(pair for pair in zip(CASES, ["loco", "simclr", "gim", "loco", "simclr", "gim"], strict=True)),
        *slow([(case, method) for case in CASES for method in METHODS]),
    ],
)
def test_training_equals_the_formula_with_the_network_run_twice(case: str, method: str) -> None:
    """Losses, weights, predictors, teacher and queue after several steps."""
    objective, form, *_ = CASES[case]
    net = network(method, objective, loss_form=form)
    if net.teacher is not None:
        net.teacher.total = STEPS
    reference = Reference(net, case)
    expected = [reference.advance(batch(step)) for step in range(STEPS)]
    found = train(net, range(STEPS))
    assert close(torch.tensor(found), torch.tensor(expected))
    for mine, theirs in zip(net.parameters(), reference.student.parameters(), strict=True):
        assert close(mine, theirs)
    if net.teacher is None:
        assert objective == "simsiam"
        return
    net.start_micro_batch()  # of the next step, where the teacher moves for the last one
    averages = dict(reference.teacher.backbone.named_parameters())
    assert averages
    for name, value in averages.items():
        assert close(net.teacher.backbone.get_buffer(name), value)
    for name, head in net.teacher.heads.items():
        for path, value in reference.teacher.heads[name].trunk.named_parameters():  # type: ignore[union-attr,operator]
            assert close(head.get_buffer(path), value)
    for unit_, queue in zip(net.plan.units, reference.queues, strict=False):
        assert close(unit_.head.objective.queue, queue)  # type: ignore[arg-type,union-attr]
    assert not any(p.requires_grad for p in net.teacher.parameters()) and not list(net.teacher.parameters())


@pytest.mark.parametrize("objective", ["moco", *slow(["byol"])])
def test_a_skipped_step_moves_neither_teacher_nor_queue(objective: str) -> None:
    """Nor the momentum's schedule; the steps after it are as if it had not been."""
    nets = [network("gim", objective, momentum=0.9, momentum_schedule="cosine") for _ in range(2)]
    for net in nets:
        assert net.teacher is not None
        net.skip_nonfinite, net.teacher.total = True, STEPS
        train(net, range(1))
    bad = batch(9)
    bad.images[0, 0, 0, 0] = torch.nan
    assert nets[0](bad).overflow
    assert train(nets[0], range(1, 4)) == train(nets[1], range(1, 4))
    mine, theirs = (dict(net.named_buffers()) for net in nets)
    assert all(torch.equal(mine[n], theirs[n]) for n in mine if "running" not in n and "tracked" not in n)


def embedded(net: LocalNetwork, data: Batch) -> Tensor:
    """What the teacher gives the last head."""
    passing = net.teacher_pass(data)
    assert passing is not None
    return [found for s in range(3) for found in passing.forward(s).values()][-1]


def test_a_step_of_micro_batches_moves_the_teacher_once_and_fills_the_queue_in_order() -> None:
    net = network("simclr", "moco")
    assert net.teacher is not None
    images = batch(0).images.unflatten(0, (2, IMAGES))
    halves = [images[:, part].flatten(0, 1) for part in (slice(3), slice(3, None))]
    objective = net.plan.units[0].head.objective
    before = objective.queue.clone()  # type: ignore[union-attr,operator]
    keys = []
    for number, half in enumerate(halves):
        teacher = copy.deepcopy(net)
        keys.append(unit(embedded(teacher, Batch(half, None, 2))))
        net(Batch(half, None, 2, last=number == 1)).loss.backward()
        if number == 0:
            assert torch.equal(objective.queue, before)  # type: ignore[arg-type]
    assert close(objective.queue[:6], torch.cat(keys))  # type: ignore[index]
    assert torch.equal(objective.queue[6:], before[6:]) and int(objective.oldest) == 6  # type: ignore[index,arg-type]
    net(batch(1))
    assert int(net.teacher.updates) == 1


@pytest.mark.parametrize("objective", ["moco", *slow(["mocov3", "byol"])])
def test_a_resumed_training_repeats_the_other_to_the_last_bit(objective: str) -> None:
    """From parameters and buffers alone, the momentum's schedule included; also after a skipped step."""
    net = network("loco", objective, momentum=0.9, momentum_schedule="cosine")
    resumed = network("loco", objective, momentum=0.9, momentum_schedule="cosine")
    for one in (net, resumed):
        assert one.teacher is not None
        one.skip_nonfinite, one.teacher.total = True, STEPS
    train(net, range(2))
    bad = batch(9)
    bad.images[0, 0, 0, 0] = torch.nan
    net(bad)
    resumed.load_state_dict(net.state_dict())
    assert train(net, range(2, 4)) == train(resumed, range(2, 4))
    for mine, theirs in zip(net.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs) or bool(mine.isnan().any())


def test_the_teacher_runs_no_farther_than_heads_need_it_and_keeps_nothing() -> None:
    net = network("gim", "byol")
    plain = network("gim", "infonce")
    units = (net.plan.units[0], *plain.plan.units[1:])
    mixed = (
        LocalNetwork(net.backbone, net.segments, Plan(units, 3, 2, teacher=Averaging(0.9))).double().train()
    )
    teacher = mixed.teacher
    assert teacher is not None and teacher.last == 0 and len(teacher.heads) == 1
    passing = teacher.start(batch(0))
    assert [len(passing.forward(s)) for s in range(3)] == [1, 0, 0] and passing.state() == []
    assert [len(teacher.tensors(s)) > 0 for s in range(3)] == [True, False, False]
    whole = network("gim", "byol").teacher_pass(batch(0))
    assert whole is not None
    held = [whole.state()[0].shape[1:] for s in range(2) if whole.forward(s)]
    assert held == [(16, 16, 16), (32, 8, 8)]  # one segment's output
    whole.forward(2)
    assert whole.state() == []


def test_evaluation_moves_nothing() -> None:
    net = network("gim", "moco")
    train(net, range(1))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.eval()
    losses = net(batch(1)).unit_losses
    with torch.no_grad():
        net.train()(batch(1))
    assert torch.isfinite(losses).all()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


class Needy(Head):
    needs = frozenset({Need.TEACHER})


def test_what_can_not_be_is_told() -> None:
    with pytest.raises(UserError, match=r"unit a: its head needs a teacher: make the plan with teacher="):
        Plan((LocalUnit("a", 0, 0, Needy()),), 1)
    with pytest.raises(UserError, match=r"method.head.queue=4: must be at least 6, the keys of a step"):
        network("simclr", "moco", queue=4)(batch(0))
    with pytest.raises(UserError, match=r"needs batch.teacher"):
        MoCo(4)(torch.ones(2, 4), Batch(torch.ones(2)))


def shuffled_keys(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    net = network("simclr", "moco")
    torch.manual_seed(rank())
    passing = net.teacher_pass(batch(seed + rank()))
    assert passing is not None and passing.order is not None
    keys = [found for s in range(3) for found in passing.forward(s).values()]
    return batch(seed + rank()).images.chunk(2)[1], passing.order, keys[0]


def test_shuffled_batch_norm_over_two_ranks(pool: Callable[[int], Any]) -> None:
    """A rank's teacher normalizes images of both ranks together; the keys are back where their images are."""
    (first, order, k0), (second, other, k1) = pool(2).run(shuffled_keys, 3)
    assert torch.equal(order, other) and sorted(order.tolist()) == list(range(12))
    assert {place // 6 for place in order[:6].tolist()} == {0, 1}
    net, images = network("simclr", "moco"), torch.cat([first, second])
    expected = torch.empty(12, 8, dtype=torch.float64)
    for places in order.chunk(2):
        x = images[places]
        for segment in net.segments:
            x = segment(x)
        expected[places] = net.plan.units[0].head.trunk(x).detach()  # type: ignore[operator]
    assert close(torch.cat([k0, k1]), expected)
