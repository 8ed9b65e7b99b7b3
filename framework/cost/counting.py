"""Parameters, FLOPs and saved activations of a plan.

Counted on PyTorch's fake tensors, which have shapes and no values: ResNet-152 at the recipe's batch takes
seconds and no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from framework.config.recipe import Execution, Faults, Method, Recipe
from framework.cost.activations import LiveActivations
from framework.cost.flops import Flops
from framework.data.batch import Batch
from framework.execution import LocalNetwork
from framework.execution.masks import visible_tokens
from framework.local import methods
from framework.local.head import Head
from framework.local.units import Plan
from framework.model import recipe_network, sliced_network


@dataclass(frozen=True)
class SegmentCost:
    """One segment on one rank's micro-batch.

    Attributes:
        name: of the segment.
        parameters: trainable scalars.
        flops: forward, a multiply-add counting as two.
        activation_bytes: what autograd saves for its backward.
    """

    name: str
    parameters: int
    flops: int
    activation_bytes: int


@dataclass(frozen=True)
class UnitCost:
    """One local unit on one rank's micro-batch.

    Attributes:
        name: of the unit.
        first: lowest segment of the window.
        last: highest.
        head: the kind of its trunk and what it is made of.
        parameters: trainable scalars of the head.
        flops: forward of the head.
        activation_bytes: most that window and head keep alive at once.
        weight: of the loss.
    """

    name: str
    first: int
    last: int
    head: str
    parameters: int
    flops: int
    activation_bytes: int
    weight: float


@dataclass(frozen=True)
class TeacherCost:
    """A teacher on one rank's micro-batch.

    Attributes:
        parameters: scalars of segments and heads that it averages.
        weight_bytes: of these averages, on every rank.
        flops: forward, by segment, the heads on it included.
        feature_bytes: of the largest output of a segment; nothing else of the teacher lives from one to the next.
    """

    parameters: int
    weight_bytes: int
    flops: tuple[int, ...]
    feature_bytes: int


@dataclass(frozen=True)
class PlanCost:
    """A whole plan. Where one module is trained alone, its segment is all there is, and the frozen ones cost nothing.

    Attributes:
        segments: in forward order.
        units: in the plan's order.
        images: in the micro-batch that was counted, all views together.
        peak_activation_bytes: most that autograd holds at once in a training step, with what ``execution.recompute``
            keeps; segments and units by themselves are counted without it.
        end_to_end_activation_bytes: the same with one loss on top of the network and nothing computed again.
        memory_saving: end-to-end / this plan, as in LoCo Table 7.
        teacher: where there is one; not in the activations.
    """

    segments: tuple[SegmentCost, ...]
    units: tuple[UnitCost, ...]
    images: int
    peak_activation_bytes: int
    end_to_end_activation_bytes: int
    memory_saving: float
    teacher: TeacherCost | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def plan_cost(recipe: Recipe, num_classes: int, images: int) -> PlanCost:
    """Count the recipe's plan on a micro-batch of ``images`` images, each in all its views.

    Raises:
        UserError: as ``local_network``.
    """
    net, whole_net = _networks(recipe, num_classes)
    with FakeTensorMode():
        peak, whole = _peaks(net, whole_net, images, recipe.data.image_size)
        batch = net.masked(_batch(net, images, recipe.data.image_size))
        return PlanCost(
            tuple(_segment_costs(net, batch)),
            tuple(_unit_costs(net, batch)),
            len(batch.images),
            peak,
            whole,
            whole / peak,
            _teacher_cost(net, batch),
        )


def likely_classes(recipe: Recipe) -> int:
    """Number of classes that the recipe says, or else ImageNet's: no data is opened."""
    return 10 if recipe.data.prepare == "digits" else recipe.data.num_classes or 1000


def peak_bytes(recipe: Recipe, num_classes: int, images: int) -> tuple[int, int]:
    """``peak_activation_bytes`` and ``end_to_end_activation_bytes`` of a ``PlanCost``, at a fraction of its time."""
    net, whole_net = _networks(recipe, num_classes)
    with FakeTensorMode():
        return _peaks(net, whole_net, images, recipe.data.image_size)


def step_flops(recipe: Recipe, num_classes: int, images: int) -> int:
    """FLOPs of training on a micro-batch of ``images`` images: forward, heads, teacher and gradients."""
    net = network_to_count(countable(recipe), num_classes)
    with FakeTensorMode():
        _drop_values(net)
        batch = _batch(net, images, recipe.data.image_size)
        with Flops() as counter:
            net(batch)
        return counter.total


def peak_of(net: LocalNetwork, images: int, image_size: int) -> int:
    """Most bytes that autograd holds at once in a training step; afterwards the network has no values."""
    with FakeTensorMode():
        _drop_values(net)
        return _peak(net, _batch(net, images, image_size))


def end_to_end(recipe: Recipe, plan: Plan) -> Recipe:
    """The recipe of this plan with one loss on top of the network: BP's, SimCLR's, or MAE's where tokens are masked."""
    if plan.masking is not None:
        return replace(recipe, network=replace(recipe.network, cut=2))  # stem, and all blocks
    name = "bp" if plan.supervised else "simclr"
    return replace(recipe, method=Method(name, methods.load(name).Options()))


def _networks(recipe: Recipe, num_classes: int) -> tuple[LocalNetwork, LocalNetwork]:
    """The recipe's network and the same trained end-to-end, which keeps all activations."""
    kept = countable(recipe)
    net = network_to_count(
        replace(kept, execution=Execution(recompute=recipe.execution.recompute)), num_classes
    )
    return net, network_to_count(end_to_end(kept, net.plan), num_classes)


def countable(recipe: Recipe) -> Recipe:
    """The recipe without what costs the same but needs values or a GPU, and with nothing computed again."""
    return replace(
        recipe,
        network=replace(recipe.network, sync_bn=False),
        execution=Execution(),
        faults=Faults(),
    )


def network_to_count(recipe: Recipe, num_classes: int) -> LocalNetwork:
    """The recipe's network; without values if it is to be built in slices, since it may be too large for this machine.

    Raises:
        UserError: as ``local_network``.
    """
    if recipe.engine == "fsdp":
        return sliced_network(recipe, num_classes, rank=0, ranks=1)
    return recipe_network(recipe, num_classes)


def _peaks(net: LocalNetwork, whole_net: LocalNetwork, images: int, image_size: int) -> tuple[int, int]:
    for network in (net, whole_net):
        _drop_values(network)
    batch = _batch(net, images, image_size)
    return _peak(net, batch), _peak(whole_net, batch)


def _drop_values(net: nn.Module) -> None:
    """In ``FakeTensorMode``: give every weight and buffer its shape and no memory, on the CPU."""
    fakes = {tensor: _fake(tensor) for tensor in (*net.parameters(), *net.buffers())}
    for module in net.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: fakes[t] for name, t in tensors.items() if t is not None})  # type: ignore[misc]


def _fake(tensor: Tensor) -> Tensor:
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def _batch(net: LocalNetwork, images: int, image_size: int) -> Batch:
    pixels = torch.empty(images * net.plan.views, 3, image_size, image_size)
    return Batch(pixels, torch.empty(images, dtype=torch.int64), net.plan.views)


def _peak(net: LocalNetwork, batch: Batch) -> int:
    with LiveActivations([*net.parameters(), *net.buffers(), batch.images]) as live:
        net(batch)
    return live.peak


def _segment_costs(net: LocalNetwork, batch: Batch) -> Iterator[SegmentCost]:
    x = net.first_input(batch)
    for s, segment in enumerate(net.segments):
        flops, saved, x = _forward(segment, x, net)
        x = visible_tokens(s, x, batch, net.plan.masking)
        yield SegmentCost(segment.name, sum(p.numel() for p in segment.parameters()), flops, saved)


def _teacher_cost(net: LocalNetwork, batch: Batch) -> TeacherCost | None:
    passing = net.teacher_pass(batch)
    if net.teacher is None or passing is None:
        return None
    flops, features = [], []
    for s in range(len(net.segments)):
        with Flops() as counter:
            passing.forward(s)
        flops.append(counter.total)
        features += [x.numel() * x.element_size() for x in passing.state()[:1]]
    averages = [average for s in range(len(net.segments)) for average in net.teacher.averages(s)]
    weight_bytes = sum(average.numel() * average.element_size() for average in averages)
    return TeacherCost(sum(a.numel() for a in averages), weight_bytes, tuple(flops), max(features, default=0))


def _unit_costs(net: LocalNetwork, batch: Batch) -> Iterator[UnitCost]:
    passing = net.teacher_pass(batch)
    keys = [passing.forward(s) for s in range(len(net.segments))] if passing is not None else []
    inputs = [net.first_input(batch)]
    with torch.no_grad():
        for s in range(len(net.segments) - 1):
            inputs.append(_through(net, [s], inputs[s], batch))
    for unit in net.plan.units:
        with LiveActivations([*net.parameters(), *net.buffers(), batch.images]) as live:
            x = inputs[unit.first].detach().requires_grad_(unit.first > 0)
            x = _through(net, range(unit.first, unit.last + 1), x, batch)
            with Flops() as counter:
                seen = batch._replace(teacher=keys[unit.last].get(unit.head) if keys else None)
                unit.head(unit.head.seen(net.segments[unit.last], x), seen)
        parameters = sum(p.numel() for p in unit.head.parameters() if p.requires_grad)
        yield UnitCost(
            unit.name,
            unit.first,
            unit.last,
            _describe(unit.head),
            parameters,
            counter.total,
            live.peak,
            unit.weight,
        )


def _through(net: LocalNetwork, segments: Iterable[int], x: Tensor, batch: Batch) -> Tensor:
    for s in segments:
        x = visible_tokens(s, net.segments[s](x), batch, net.plan.masking)
    return x


def _forward(run: Callable[[Tensor], Tensor], x: Tensor, net: nn.Module) -> tuple[int, int, Tensor]:
    x = x.detach()
    with (
        LiveActivations([*net.parameters(), *net.buffers(), x]) as live,
        Flops() as counter,
    ):
        x = run(x)
    return counter.total, live.peak, x


def _describe(head: Head) -> str:
    """The kind of its trunk and its layers with weights, such as ``mlp_sr: 4 Conv2d, 2 Linear``."""
    layers = [type(m).__name__ for m in head.modules() if not list(m.children()) and list(m.parameters())]
    kinds = [kind for kind in dict.fromkeys(layers) if "Norm" not in kind]
    text = ", ".join(f"{layers.count(k)} {k}" if layers.count(k) > 1 else k for k in kinds)
    return f"{head.kind}: {text}" if head.kind else text
