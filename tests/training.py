"""A few training steps of a small network: once in a plain loop, once with an engine on the ranks of a pool."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from framework import engines
from framework.batch import Batch
from framework.distributed import is_main, rank, world_size
from framework.engines.step import marked
from framework.model import local_network
from framework.optim import build_optimizer

BASE_LR = {"lars": 5.0, "sgd": 0.05, "adamw": 0.002}
IMAGES, SIZE, CLASSES = 16, 16, 4


@dataclass(frozen=True)
class Case:
    """What is trained, and with what."""

    method: str = "loco"
    cut: str = "stage"
    optimizer: str = "lars"
    engine: str = "deepspeed"
    zero_stage: int = 1
    accumulation: int = 1
    clip: float = 0.0
    steps: int = 3
    dtype: str = "float32"
    precision: str = "fp32"
    deepspeed: dict[str, Any] = field(default_factory=dict)

    @property
    def views(self) -> int:
        return 2 if self.method in ("loco", "simclr", "gim") else 1


class Run(NamedTuple):
    """What a training leaves: canonical states and the unit losses (steps, U)."""

    model: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    losses: Tensor


def network(case: Case) -> nn.Module:
    torch.manual_seed(0)
    net = local_network(
        "resnet8",
        case.method,
        image_size=SIZE,
        num_classes=CLASSES,
        cut=case.cut,
        precision=case.precision,
        sync_bn=True,
    )
    return net.to(getattr(torch, case.dtype)).train()


def micro_batches(case: Case, step: int, part: int = 0, parts: int = 1) -> list[Batch]:
    """This rank's part of every micro-batch of a step, the way the loader slices them."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(case.views, IMAGES, 3, SIZE, SIZE, generator=generator).to(
        getattr(torch, case.dtype)
    )
    labels = torch.randint(CLASSES, (IMAGES,), generator=generator)
    batches = []
    for x, y in zip(images.chunk(case.accumulation, 1), labels.chunk(case.accumulation), strict=True):
        x, y = x.chunk(parts, 1)[part], y.chunk(parts)[part]
        batches.append(Batch(x.flatten(0, 1), y, case.views))
    return batches


def optimizer_factory(case: Case) -> partial[Any]:
    return partial(build_optimizer, name=case.optimizer, weight_decay=1e-3)


def learning_rate(case: Case, step: int) -> float:
    return BASE_LR[case.optimizer] * (1.0, 0.5, 0.8)[step % 3]


def plain(case: Case) -> Run:
    """The definition: one process, the global micro-batches, PyTorch and nothing else."""
    net = network(case)
    optimizer = optimizer_factory(case)(net)
    losses = []
    for step in range(case.steps):
        outputs = []
        for batch in marked(micro_batches(case, step)):
            output = net(batch)
            (output.loss / case.accumulation).backward()
            outputs.append(output.unit_losses)
        if case.clip:
            nn.utils.clip_grad_norm_(net.parameters(), case.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(case, step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(torch.stack(outputs).mean(0))
    states = {name: dict(optimizer.state[p]) for name, p in net.named_parameters()}
    return Run({k: v.detach().clone() for k, v in net.state_dict().items()}, states, torch.stack(losses))


def build(case: Case, net: nn.Module | None = None) -> engines.Engine:
    return engines.build(
        case.engine,
        net if net is not None else network(case),
        optimizer_factory(case),
        batch_size=IMAGES,
        accumulation=case.accumulation,
        clip=case.clip,
        zero_stage=case.zero_stage,
        deepspeed=case.deepspeed,
    )


def advance(engine: engines.Engine, case: Case, first: int, last: int) -> Tensor:
    """Steps ``first`` to ``last - 1``; unit losses (steps, U)."""
    return torch.stack(
        [
            engine.step(
                micro_batches(case, step, rank(), world_size()), learning_rate(case, step)
            ).unit_losses
            for step in range(first, last)
        ]
    )


def train(case: Case) -> Run | None:
    """The same under an engine, on every rank of a pool; the result is rank 0's."""
    engine = build(case)
    losses = advance(engine, case, 0, case.steps)
    run = Run(engine.model_state(), engine.optimizer_state(), losses)
    engine.close()
    return run if is_main() else None


def error(run: Run, reference: Run, case: Case) -> float:
    """Largest difference of a parameter, relative to how far that parameter moved."""
    initial = dict(network(case).named_parameters())
    worst = 0.0
    for name, start in initial.items():
        moved = (reference.model[name] - start.detach()).abs().max()
        worst = max(worst, float((run.model[name] - reference.model[name]).abs().max() / moved))
    return worst


def describe(case: Case) -> str:
    """The fields that differ from the defaults."""
    default = asdict(Case())
    return " ".join(f"{k}={v}" for k, v in asdict(case).items() if v != default[k]) or "default"
