"""A routed step by itself: no module, heads on several segments, overflows of float16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from framework.data.batch import Batch
from framework.execution import LocalNetwork
from framework.execution.naive import naive_gradients
from framework.execution.precision import Scale, summed
from framework.execution.program import Program
from framework.execution.step import RoutedStep
from framework.local import Classifier, LocalUnit, NetworkInfo, Plan
from framework.local.head import Head
from framework.network import create, cut
from framework.pipeline.scheduling.placement import Placement
from framework.pipeline.scheduling.weight_readers import WeightReaders
from framework.runtime.errors import UserError
from tests.support import networks
from tests.support.networks import CLASSES, relative_error


class MeanSquare(Head):
    """Has no parameters."""

    def loss(self, x: Tensor, batch: Batch) -> Tensor:
        return x.square().mean()


@pytest.mark.parametrize("span", [range(3), range(1, 3)])
def test_a_step_needs_a_program_and_no_module(span: range) -> None:
    """Windows [0..1] and [1..2] of three layers, in one process and on the upper ranks alone."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))).double()
    segments = [NamedLayer(layers, str(i)) for i in range(3)]
    heads = [MeanSquare(), MeanSquare()]
    plan = Plan((LocalUnit("a", 0, 1, heads[0]), LocalUnit("b", 1, 2, heads[1], weight=0.5)), 3)
    x = torch.randn(5, 4, dtype=torch.float64)
    step = RoutedStep(Program.of(plan, segments), Batch(x), span)  # type: ignore[arg-type]
    h = x if span.start == 0 else layers[0](x)
    for s in span:
        h = step.forward(s, h)
        step.run_heads(s)
        step.walk(s)
    first = layers[0](x)
    a = layers[1](first).square().mean()
    b = 0.5 * layers[2](layers[1](first.detach())).square().mean()
    at_edge, *expected = torch.autograd.grad(a + b, [first, *layers.parameters()])
    found = [step.gradients.get(p) for p in layers.parameters()]
    for ours, theirs in zip(found[2 * span.start :], expected[2 * span.start :], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert step.losses == {0: a, 1: 2 * b}
    (outgoing,) = step.outgoing.values() if span.start else (None,)
    if outgoing is not None:
        torch.testing.assert_close(outgoing.value, at_edge)
        assert found[:2] == [None, None]


class NamedLayer:
    """What a step asks of a segment."""

    def __init__(self, layers: nn.Sequential, name: str) -> None:
        self.layer, self.name = layers.get_submodule(name), name
        self.parameters = self.layer.parameters

    def __call__(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def to_map(self, x: Tensor) -> Tensor:
        return x


def shared_head(weights: tuple[float, ...] = (1.0, 0.25, 1.0), precision: str = "fp32") -> LocalNetwork:
    """One classifier on both segments of the first stage, in units of different weights, and one on top."""
    torch.manual_seed(0)
    backbone = create("resnet14")
    segments = cut(backbone, [f"layer{s}.{b}" for s, b in ((1, 0), (1, 1), (3, 1))])
    info = NetworkInfo.of(segments, 16, CLASSES)
    shared = Classifier().build(info, 0)
    heads = (shared, shared, Classifier().build(info, 2))
    units = [LocalUnit(f"u{i}", i, i, heads[i], weights[i]) for i in range(3)]
    return LocalNetwork(backbone, segments, Plan(tuple(units), 3), precision).train()


def test_one_head_on_two_segments_gets_the_sum_of_both_gradients() -> None:
    net = shared_head().double()
    data = networks.batch(net)
    ours = networks.routed(net, data)
    assert list(net.heads) == ["u0", "u2"]
    _, theirs = naive_gradients(net, data)
    names = {p: name for name, p in net.named_parameters()}
    assert len(theirs) == len(ours)
    for parameter, gradient in theirs.items():
        assert relative_error(ours[names[parameter]], gradient) < 1e-12, names[parameter]
    second_alone = networks.routed(shared_head((1e-30, 0.25, 1.0)).double(), data)
    assert relative_error(second_alone["heads.u0.trunk.1.weight"], ours["heads.u0.trunk.1.weight"]) > 0.1


def test_one_head_on_two_segments_in_float16() -> None:
    """Each run of the head has a loss scale of its own."""
    half, full = shared_head(precision="fp16"), shared_head()
    assert half.scales is not None and len(half.scales.scale.unique()) == 2
    data = networks.batch(full, size=64)
    data = data._replace(images=data.images.float())
    ours, theirs = networks.routed(half, data), networks.routed(full, data)
    assert relative_error(ours["heads.u0.trunk.1.weight"], theirs["heads.u0.trunk.1.weight"]) < 0.02


@pytest.mark.parametrize("scales", [(2.0**3, 2.0**20), (2.0**20, 2.0**3), (2.0**9, 2.0**9)])
def test_float16_cotangents_whose_scales_the_host_does_not_know_add_up_as_if_it_did(
    scales: tuple[float, float],
) -> None:
    """To the last bit, in the smaller scale; in the larger the sum would overflow."""
    torch.manual_seed(0)
    a, b = 100 * torch.randn(2, 1000).half()
    expected, scale = summed(a, Scale(scales[0]), b, Scale(scales[1]))
    assert scale == Scale(min(scales)) and expected.isfinite().all()
    on_device = [Scale(2.0, torch.tensor(number / 2, dtype=torch.float64)) for number in scales]
    found, scale = summed(a, on_device[0], b, on_device[1])
    assert torch.equal(found, expected) and scale.on_device() == min(scales)


def test_a_head_on_two_stages_of_a_pipeline_is_refused() -> None:
    net = shared_head()
    WeightReaders(net, Placement((0, 2, 3)))
    with pytest.raises(UserError, match=r"the head of unit u0 stands on segments of several stages"):
        WeightReaders(net, Placement((0, 1, 3)))


class Steep(Head):
    """The gradient of its own weight is 1e30; that of its input is small."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def loss(self, x: Tensor, batch: Batch) -> Tensor:
        return x.float().mean() + 1e30 * self.weight.sum()


@pytest.mark.parametrize("case", ["dgl"])
def test_an_overflow_in_a_heads_own_weights_skips_the_step(case: str) -> None:
    """Times a scale of 2^40 it leaves float32's range; cotangents and all other gradients stay finite."""
    net = networks.network(case)
    units = list(net.plan.units)
    units[1] = LocalUnit("steep", 1, 1, Steep())
    half = LocalNetwork(net.backbone, net.segments, Plan(tuple(units), len(units)), "fp16").train()
    data = networks.batch(half)
    data = data._replace(images=data.images.float())
    assert half.scales is not None
    calm = half(data)
    assert calm.overflow is not None and not calm.overflow
    half.scales.scale[1] = 2.0**40
    before = half.scales.scale.clone()
    output = half(data)
    assert torch.isfinite(output.loss) and output.overflow is not None and output.overflow
    assert half.scales.scale[1] == before[1] / 2
    assert torch.equal(half.scales.scale[[0, 2, 3, 4, 5]], before[[0, 2, 3, 4, 5]])
