"""A few training steps: once in a plain loop, once with an engine on the ranks of a pool.

Two networks. ``Dyadic`` has gradients that sum without rounding in any order, so that engines must agree with
the plain loop to the last bit. A real ``LocalNetwork`` has collectives of its own; float64 shows its equality.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from framework import engines
from framework.config.recipe import Sharding
from framework.data.batch import Batch
from framework.engines.base import EngineSettings, marked, set_learning_rate
from framework.execution import StepOutput
from framework.execution.hooks import StepHooks
from framework.execution.uses import Use, Uses
from framework.local import methods
from framework.model import local_network
from framework.optim import build_optimizer
from framework.runtime.distributed import device, is_main, rank, world_size
from tests.support import networks

BASE_LR = {"lars": 0.5, "sgd": 0.002, "adamw": 0.0005}
IMAGES, SIZE, CLASSES = 16, 16, 4
WEIGHT_DECAY = 1e-3
SHORT = {"mlaan": {"window": 2}}  # ResNet-8 has three segments


@dataclass(frozen=True)
class Case:
    """What is trained, and with what. ``method`` is a local method with ``options``, or "dyadic"; ``network`` is one of
    ``networks.TRANSFORMERS`` or timm's.
    """

    method: str = "dyadic"
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
    options: dict[str, Any] = field(default_factory=dict)
    network: str = "resnet8"
    layer_decay: float = 1.0
    sharding: dict[str, Any] = field(default_factory=dict)
    recompute: str = "none"

    def __str__(self) -> str:
        default = asdict(Case())
        return " ".join(f"{k}={v}" for k, v in asdict(self).items() if v != default[k]) or "default"

    @property
    def views(self) -> int:
        return 2 if self.method in ("loco", "simclr", "gim", "blockwise") else 1


class Run(NamedTuple):
    """What a training leaves: canonical states and the unit losses (steps, U)."""

    model: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    losses: Tensor


class Dyadic(nn.Module):
    """Gradients are small multiples of 1/256: averages over 2, 4 or 8 parts are exact, whatever the order.

    Each weight is a segment of its own. An image whose first pixel is infinite makes the step overflow, as float16
    would, if steps may be skipped.
    """

    average = made = None

    def __init__(self, may_skip: bool = False) -> None:
        super().__init__()
        self.may_skip, self._hooks = may_skip, None
        generator = torch.Generator().manual_seed(0)
        # No size fits a partition; the largest spans several of them.
        shapes = [(5, 3), (3,), (31, 7), (1,), (2, 2, 3, 3), (6,)]
        self.weights = nn.ParameterList(torch.randn(shape, generator=generator) for shape in shapes)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def attach(self, hooks: StepHooks) -> Any:
        self._hooks = hooks
        users = {weight: number for number, weight in enumerate(self.weights)}
        return SimpleNamespace(order=[[weight] for weight in reversed(self.weights)], users=users)

    def uses(self) -> Uses:
        numbers = range(len(self.weights))
        turns = [[Use("forward", number)] for number in numbers]
        turns += [[Use("backward", number)] for number in reversed(numbers)]
        nothing = {Use("heads", number): [] for number in numbers}
        return Uses(turns, {use: [self.weights[use.segment]] for turn in turns for use in turn} | nothing)

    def detach(self) -> None:
        self._hooks = None

    def forward(self, batch: Batch) -> StepOutput:
        digits = (batch.images.flatten(1)[:, :8] * 16).round() / 256
        loss = digits.new_zeros(())
        for number, weight in enumerate(self.weights):
            if self._hooks is not None:
                self._hooks.before(Use("forward", number))
            pattern = (
                torch.arange(weight.numel(), device=weight.device).remainder(number + 3).view_as(weight) - 1
            )
            loss = loss + (weight * pattern).sum() * digits[:, number].mean()
            if self._hooks is not None:
                self._hooks.after(Use("forward", number))
        self.seen += 1
        if self._hooks is not None:
            for number, weight in reversed(list(enumerate(self.weights))):
                self._hooks.before(Use("backward", number))
                gradient = torch.autograd.grad(loss, weight, retain_graph=True)[0]
                self._hooks.after(Use("backward", number))
                self._hooks.finished({weight: gradient})
        if not self.may_skip:
            return StepOutput(loss.detach() if self._hooks is not None else loss, digits.mean(0))
        overflow = (~torch.isfinite(batch.images)).any().float()
        if world_size() > 1:
            torch.distributed.all_reduce(overflow)
        return StepOutput(loss, digits.mean(0), overflow > 0)


def network(case: Case) -> Any:
    if case.method == "dyadic":
        return Dyadic()
    backbone: str | nn.Module = case.network
    if (
        case.network in networks.TRANSFORMERS
    ):  # the bias of keys has no gradient, and AdamW would follow its rounding
        backbone = networks.transformer(case.network, SIZE, qkv_bias=False, drop_path_rate=0.0)
    torch.manual_seed(0)
    net = local_network(
        backbone,
        case.method,
        methods.load(case.method).Options(**SHORT.get(case.method, {}) | case.options),
        image_size=SIZE,
        num_classes=CLASSES,
        cut=case.cut,
        stem_as_module=case.method == "mim",
        precision=case.precision,
        sync_bn=True,
        recompute=case.recompute,
    )
    return net.to(getattr(torch, case.dtype)).train()


def micro_batches(case: Case, step: int, part: int = 0, parts: int = 1) -> list[Batch]:
    """This rank's part of every micro-batch of a step, sliced as the loader slices them."""
    generator = torch.Generator().manual_seed(step)
    # Blobs of color, of which a view is a noisy copy. Plain noise would look alike to a network that pools
    # it, and the BatchNorm of a head would blow rounding errors up to the size of the signal.
    blobs = torch.randn(1, IMAGES, 3, 4, 4, generator=generator)
    blobs = blobs.repeat_interleave(SIZE // 4, 3).repeat_interleave(SIZE // 4, 4)
    noise = torch.randn(case.views, IMAGES, 3, SIZE, SIZE, generator=generator)
    images = (blobs + 0.3 * noise).to(getattr(torch, case.dtype))
    labels = torch.randint(CLASSES, (IMAGES,), generator=generator)
    batches = []
    for x, y in zip(images.chunk(case.accumulation, 1), labels.chunk(case.accumulation), strict=True):
        mine = x.chunk(parts, 1)[part].flatten(0, 1)
        last = len(batches) + 1 == case.accumulation
        batches.append(Batch(mine, y.chunk(parts)[part], case.views, last))
    return batches


def optimizer_factory(case: Case) -> partial[Any]:
    return partial(
        build_optimizer, name=case.optimizer, weight_decay=WEIGHT_DECAY, layer_decay=case.layer_decay
    )


def learning_rate(case: Case, step: int) -> float:
    return BASE_LR[case.optimizer] * (1.0, 0.5, 0.8)[step % 3]


def plain(case: Case, steps: range | None = None) -> Run:
    """The definition: one process, the global micro-batches, PyTorch and nothing else."""
    net = network(case)
    optimizer = optimizer_factory(case)(net)
    losses = []
    for step in steps or range(case.steps):
        torch.manual_seed(step)  # of masks, as runs set it
        outputs = []
        for batch in marked(micro_batches(case, step)):
            output = net(batch)
            (output.loss / case.accumulation).backward()
            outputs.append(output.unit_losses)
        if case.clip:
            nn.utils.clip_grad_norm_(net.parameters(), case.clip)
        set_learning_rate(optimizer, learning_rate(case, step))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(torch.stack(outputs).mean(0))
    states = {name: dict(optimizer.state[p]) for name, p in net.named_parameters()}
    return Run({k: v.detach().clone() for k, v in net.state_dict().items()}, states, torch.stack(losses))


def build(case: Case, net: nn.Module | None = None) -> engines.Engine:
    return engines.build(
        case.engine,
        network(case) if net is None else net,
        optimizer_factory(case),
        settings(case),
    )


def settings(case: Case) -> EngineSettings:
    sharding = Sharding(**case.sharding)
    return EngineSettings(IMAGES, case.accumulation, case.clip, case.zero_stage, case.deepspeed, sharding)


def advance(engine: engines.Engine, case: Case, steps: range) -> Tensor:
    """Run steps; their unit losses (steps, U)."""
    results = []
    for step in steps:
        torch.manual_seed(step)
        parts = micro_batches(case, step, rank(), world_size())
        result = engine.step(
            [networks.on(device(), part) for part in parts], partial(learning_rate, case, step)
        )
        results.append(torch.tensor(result.losses()(), dtype=result.unit_losses.dtype))
    return torch.stack(results) if results else torch.empty(0)


def train(case: Case, net: nn.Module | None = None) -> Run | None:
    """The same under an engine, on every rank of a pool; the result is rank 0's."""
    engine = build(case, net)
    losses = advance(engine, case, range(case.steps))
    run = Run(engine.model_state(), engine.optimizer_state(), losses)
    engine.close()
    return run if is_main() else None


def flat(run: Run) -> dict[str, Tensor]:
    """Every tensor of a run by name."""
    states = {
        f"{name}/{key}": value for name, values in run.optimizer.items() for key, value in values.items()
    }
    return {**run.model, **states, "losses": run.losses}


def differences(run: Run, reference: Run) -> dict[str, float]:
    """Largest difference of every tensor, relative to its largest element; only those that differ."""
    mine, theirs = flat(run), flat(reference)
    assert mine.keys() == theirs.keys()
    errors = {
        name: float(
            (value.double() - theirs[name].double()).abs().max() / theirs[name].abs().max().clamp_min(1e-30)
        )
        for name, value in mine.items()
    }
    return {name: error for name, error in errors.items() if error != 0 or error != error}
