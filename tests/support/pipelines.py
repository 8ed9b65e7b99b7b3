"""Training in pipeline stages on the ranks of a pool, and the same in one process."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from framework.config.recipe import Pipeline
from framework.data.batch import Batch
from framework.engines.base import EngineSettings, marked, set_learning_rate
from framework.execution import LocalNetwork
from framework.optim import build_optimizer
from framework.pipeline.engine import PipelinedEngine
from framework.pipeline.scheduling.placement import Placement, balanced
from framework.runtime.distributed import is_main, rank, world_size
from tests.support import networks

RATES = (0.02, 0.01, 0.03)
IMAGES, SIZE = 8, 16


@dataclass(frozen=True)
class Run:
    """What is trained: a case of ``networks``, and in which pieces.

    ``network`` is ResNet-14 or one of ``networks.TRANSFORMERS``.
    """

    case: str
    stages: int = 2
    micro_batches: int = 2
    steps: int = 3
    replicas: int = 1
    zero_stage: int = 0
    optimizer: str = "sgd"
    clip: float = 0.0
    dtype: str = "float64"
    precision: str = "fp32"
    bounds: tuple[int, ...] | None = None
    network: str = "resnet14"
    options: dict[str, Any] = field(default_factory=dict)
    layer_decay: float = 1.0
    recompute: str = "none"

    def __str__(self) -> str:
        default = Run("")
        return " ".join(
            [self.case]
            + [f"{k}={v}" for k, v in vars(self).items() if k != "case" and v != getattr(default, k)]
        )

    @property
    def ranks(self) -> int:
        return self.stages * self.replicas


class Outcome(NamedTuple):
    """Canonical states after the run, and the unit losses (steps, U)."""

    model: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    losses: Tensor


def network(run: Run) -> LocalNetwork:
    backbone: str | nn.Module = run.network
    if run.network in networks.TRANSFORMERS:
        backbone = networks.transformer(run.network, SIZE)
    net = networks.network(
        run.case, backbone, image_size=SIZE, precision=run.precision, sync_bn=True, recompute=run.recompute
    )
    if net.scales is not None:
        net.scales.scale.mul_(2.0**-8)  # as after some steps: at first they may overflow
    return net.to(getattr(torch, run.dtype))


def micro_batches(run: Run, net: LocalNetwork, step: int, part: int = 0, parts: int = 1) -> list[Batch]:
    """One replica's share of every micro-batch of a step.

    Blobs of color, of which a view is a noisy copy: after pooling, plain noise looks alike, and the BatchNorm of
    a head would blow rounding errors up to the size of the signal.
    """
    batches, views, generator = [], net.plan.views, torch.Generator().manual_seed(step)
    for _ in range(run.micro_batches):
        blobs = torch.randn(1, IMAGES, 3, 4, 4, generator=generator)
        blobs = blobs.repeat_interleave(SIZE // 4, 3).repeat_interleave(SIZE // 4, 4)
        images = blobs + 0.3 * torch.randn(views, IMAGES, 3, SIZE, SIZE, generator=generator)
        labels = torch.randint(networks.CLASSES, (IMAGES,), generator=generator).chunk(parts)[part]
        mine = images.to(getattr(torch, run.dtype)).chunk(parts, 1)[part].flatten(0, 1)
        batches.append(Batch(mine, labels if net.plan.supervised else None, views))
    return batches


def factory(run: Run) -> partial[Any]:
    trust = {"trust": 0.02} if run.optimizer == "lars" else {}
    return partial(
        build_optimizer, name=run.optimizer, weight_decay=1e-3, layer_decay=run.layer_decay, **trust
    )


def rate(run: Run, step: int) -> float:
    return RATES[step % 3] * {"sgd": 1.0, "lars": 20.0, "adamw": 0.05}[run.optimizer]


def alone(run: Run, device: str | torch.device = "cpu") -> Outcome:
    """The definition: the routed network in one process, on the same micro-batches, with accumulation."""
    net = network(run).to(device)
    optimizer = factory(run)(net)
    history = []
    for step in range(run.steps):
        torch.manual_seed(step)  # of noise
        outputs = []
        for batch in marked(micro_batches(run, net, step)):
            output = net(networks.on(device, batch))
            (output.loss / run.micro_batches).backward()
            outputs.append(output.unit_losses)
        if run.clip:
            nn.utils.clip_grad_norm_(net.parameters(), run.clip)
        set_learning_rate(optimizer, rate(run, step))
        optimizer.step()
        optimizer.zero_grad()
        history.append(torch.stack(outputs).mean(0))
    states = {
        name: {key: torch.as_tensor(value).cpu() for key, value in optimizer.state[p].items()}
        for name, p in net.named_parameters()
        if optimizer.state.get(p)
    }
    model = {name: value.detach().cpu().clone() for name, value in net.state_dict().items()}
    return Outcome(model, states, torch.stack(history).cpu())


def build(run: Run, timeout: float = 60.0, net: LocalNetwork | None = None) -> PipelinedEngine:
    gc.collect()  # engines of earlier runs are rings of references, and hold groups with threads
    net = network(run) if net is None else net
    placement = Placement(run.bounds) if run.bounds else balanced([1.0] * len(net.segments), run.stages)
    settings = EngineSettings(IMAGES * run.micro_batches, run.micro_batches, run.clip, run.zero_stage)
    options = Pipeline(stages=run.stages, timeout=timeout, **run.options)
    return PipelinedEngine(net, factory(run), settings, placement, options)


def advance(engine: PipelinedEngine, run: Run, steps: range) -> Tensor:
    """Run steps without reading their losses; then those (steps, U)."""
    results = []
    for step in steps:
        replicas = world_size() // run.stages
        torch.manual_seed(step)  # of noise
        batches = micro_batches(run, engine.net, step, rank() % replicas, replicas) if engine.loads else []
        results.append(engine.step(batches, partial(rate, run, step)))
    return torch.tensor([result.losses()() for result in results], dtype=torch.float64)


def train(run: Run) -> Outcome | None:
    """On every rank of a pool; the result is rank 0's."""
    engine = build(run)
    losses = advance(engine, run, range(run.steps))
    outcome = Outcome(engine.model_state(), engine.optimizer_state(), losses)
    engine.close()
    return outcome if is_main() else None


def errors(ours: Outcome, theirs: Outcome) -> dict[str, float]:
    """Largest difference of every tensor, relative to its largest element."""
    flat = [
        {**o.model, "losses": o.losses}
        | {f"{name}/{key}": value for name, state in o.optimizer.items() for key, value in state.items()}
        for o in (ours, theirs)
    ]
    assert flat[0].keys() == flat[1].keys()
    return {
        name: float(
            (value.double() - flat[1][name].double()).abs().max() / flat[1][name].abs().max().clamp_min(1e-3)
        )
        for name, value in flat[0].items()
        if value.numel()
    }
