"""The routed step equals the definition, keeps no more alive than the widest window, and leaks nothing."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from framework.cost.activations import LiveActivations
from framework.data.batch import Batch
from framework.execution import LocalNetwork
from framework.execution.masks import visible_tokens
from framework.execution.naive import naive_gradients
from framework.execution.precision import GROWTH_INTERVAL, START, LossScales
from framework.local import Classifier, LocalUnit, NetworkInfo, Plan
from framework.local.head import Head, WrappingHead
from framework.local.methods import dgl
from framework.network import create, cut
from framework.runtime.errors import UserError
from tests.support import networks
from tests.support.networks import CASES, relative_error


def assert_equals_definition(net: LocalNetwork, batch: Batch) -> None:
    """Routed losses, gradients and BatchNorm statistics against the repeated-forward definition."""
    literal = copy.deepcopy(net)
    torch.manual_seed(1)  # of noise
    output = net(batch)
    output.loss.backward()
    torch.manual_seed(1)
    losses, gradients = naive_gradients(literal, batch)
    by_name = {name: gradients[p] for name, p in literal.named_parameters() if p.requires_grad}
    assert torch.allclose(output.unit_losses, torch.stack(losses), rtol=1e-12)
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            error = (parameter.grad - by_name[name]).norm()
            assert error < 1e-10 * by_name[name].norm() + 1e-13, name  # a bias before a BatchNorm has 0
    for (name, ours), theirs in zip(net.named_buffers(), literal.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_the_definition(case: str) -> None:
    net = networks.network(case).double()
    assert_equals_definition(net, networks.batch(net))


windows = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 5), st.sampled_from((0.001, 0.5, 1.0))), max_size=6
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(windows, st.data())
def test_random_windows_equal_the_definition(
    drawn: list[tuple[int, int, float]], data: st.DataObject
) -> None:
    torch.manual_seed(0)
    backbone = create("resnet14")
    segments = cut(backbone, "block")
    info = NetworkInfo.of(segments, 8, networks.CLASSES)
    spans = [(min(a, b), max(a, b), w) for a, b, w in drawn] + [(0, 5, 1.0)]
    units, heads = [], {}
    for i, (first, last, weight) in enumerate(spans):
        # Segments of one width may share a head, too.
        key = data.draw(st.sampled_from((last, info.shapes[last].channels, f"u{i}")))
        head = heads.setdefault(key, Classifier().build(info, last))
        trains = (
            data.draw(st.none() | st.frozensets(st.integers(first, last), min_size=1))
            if i < len(drawn)
            else None
        )
        units.append(LocalUnit(f"u{i}", first, last, head, weight, trains))
    net = LocalNetwork(backbone, segments, Plan(tuple(units), len(segments))).double().train()
    assert_equals_definition(net, networks.batch(net, size=4, image_size=8))


class Poison(WrappingHead):
    """A head whose loss and gradient are NaN."""

    def __init__(self, head: Head) -> None:
        super().__init__("front", nn.Identity(), head)

    def loss(self, x: Tensor, batch: Batch) -> Tensor:
        return super().loss(x, batch) * float("nan")


@pytest.mark.parametrize("case", ["gim", "loco", "dgl", "mlm-2", "mlm-3"])
def test_a_gradient_boundary_leaks_nothing(case: str) -> None:
    """A unit whose gradient is NaN spoils its own window and head, and not one element elsewhere."""
    net = networks.network(case).double()
    data = networks.batch(net)
    for spoilt in range(len(net.plan.units)):
        unit = net.plan.units[spoilt]
        units = [
            dataclasses.replace(u, head=Poison(copy.deepcopy(u.head))) if i == spoilt else u
            for i, u in enumerate(net.plan.units)
        ]
        poisoned = LocalNetwork(net.backbone, net.segments, dataclasses.replace(net.plan, units=tuple(units)))
        poisoned = copy.deepcopy(poisoned).train()
        poisoned(data).loss.backward()
        for s, segment in enumerate(poisoned.segments):
            finite = all(torch.isfinite(p.grad).all() for p in segment.parameters())
            assert finite == (not unit.first <= s <= unit.last), (unit.name, segment.name)


@pytest.mark.parametrize("case", [case for case in CASES if case != "dfa"])  # which frees nothing early
def test_peak_activations_equal_the_widest_windows(case: str) -> None:
    """Counted against each window run alone, end to end, in plain autograd."""
    net = networks.network(case, image_size=32)
    data = networks.batch(net, image_size=32)
    data = data._replace(images=data.images.float())
    with LiveActivations([*net.parameters(), *net.buffers(), data.images]) as routed:
        net(data).loss.backward()
    assert routed.now == 0
    seen = networks.taught_by(net, net.masked(data))
    assert routed.peak == max(_alone(net, unit, seen[unit.head]) for unit in net.plan.units)


def _alone(net: LocalNetwork, unit: LocalUnit, data: Batch) -> int:
    x = net.first_input(data)
    with torch.no_grad():
        for s, segment in enumerate(net.segments[: unit.first]):
            x = segment(x)
            x = visible_tokens(s, x, data, net.plan.masking)
    ignored = [data.images] if unit.first == 0 else []
    with LiveActivations([*net.parameters(), *net.buffers(), *ignored]) as live:
        for s in range(unit.first, unit.last + 1):
            x = net.segments[s](x)
            x = x if net.noise is None else net.noise.on(x, s)
            x = visible_tokens(s, x, data, net.plan.masking)
        torch.autograd.grad(unit.head(x, data), list(unit.head.parameters()))
    return live.peak


@pytest.mark.parametrize("mode", ["eval", "no_grad"])
def test_evaluation_gives_the_losses_and_moves_nothing(mode: str) -> None:
    net = networks.network("mlm-2").double()
    data = networks.batch(net)
    before = copy.deepcopy(net.state_dict())
    if mode == "eval":
        output = net.eval()(data)
        logits = net.predict(data.images)
        assert torch.allclose(output.unit_losses[-1], nn.functional.cross_entropy(logits, data.labels))
    else:
        with torch.no_grad():
            output = net(data)
        trained = copy.deepcopy(net)(data)
        assert torch.allclose(output.unit_losses, trained.unit_losses, rtol=1e-12)
    assert not output.loss.requires_grad
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_gradients_carry_the_factor_of_the_loss_and_accumulate() -> None:
    """As accumulation and loss scaling outside need it: (loss / 4).backward(), twice."""
    net = networks.network("loco").double()
    data = networks.batch(net)
    once = networks.routed(net, data)
    for _ in range(2):
        (net(data).loss / 4).backward()
    for name, parameter in net.named_parameters():
        assert relative_error(parameter.grad, once[name] / 2) < 1e-12, name


def test_gradients_are_handed_over_once() -> None:
    net = networks.network("dgl").double()
    loss = net(networks.batch(net)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed over already"):
        loss.backward()


def test_dropout_is_drawn_once_a_step() -> None:
    """Stochastic depth: the routed step runs each segment once, so all windows share one mask."""
    torch.manual_seed(0)
    backbone = create("resnet18", drop_path_rate=0.5)
    segments = cut(backbone, "stage")
    info = NetworkInfo.of(segments, 32, networks.CLASSES)
    units = [LocalUnit(f"u{i}", max(0, i - 1), i, Classifier().build(info, i)) for i in range(4)]
    net = LocalNetwork(backbone, segments, Plan(tuple(units), 4)).double().train()
    data = networks.batch(net, image_size=32)
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        runs.append(networks.routed(net, data))
    connected = copy.deepcopy(net)
    torch.manual_seed(1)
    x, loss = data.images, torch.zeros(())
    outputs = []
    for segment in connected.segments:
        x = segment(x)
        outputs.append(x)
    loss = connected.plan.units[3].head(outputs[3], data)
    expected = torch.autograd.grad(loss, list(connected.segments[3].parameters()))
    for parameter, ours, again in zip(
        expected,
        [runs[0][n] for n in _names(net, 3)],
        [runs[1][n] for n in _names(net, 3)],
        strict=True,
    ):
        assert torch.equal(ours, again)
        assert relative_error(ours, parameter) < 1e-10


def _names(net: LocalNetwork, segment: int) -> list[str]:
    ids = {id(p): n for n, p in net.named_parameters()}
    return [ids[id(p)] for p in net.segments[segment].parameters()]


@pytest.mark.parametrize("weight", [1.0, 0.001])
def test_float16_gradients_of_a_light_unit(weight: float) -> None:
    """Within 5 % of fp32's for every unit; without a loss scale a unit of weight 0.001 would lose its cotangents."""
    torch.manual_seed(0)
    options = dgl.Options(head=Classifier("linear"))
    plain = networks.local_network(
        "resnet14", "dgl", options, image_size=16, num_classes=10, cut="block"
    ).train()
    plan = dataclasses.replace(
        plain.plan, units=tuple(dataclasses.replace(u, weight=weight) for u in plain.plan.units)
    )
    full = LocalNetwork(plain.backbone, plain.segments, plan, "fp32").train()
    half = copy.deepcopy(LocalNetwork(plain.backbone, plain.segments, plan, "fp16")).train()
    data = networks.batch(full, size=64)
    data = data._replace(images=data.images.float())
    full(data).loss.backward()
    output = half(data)
    output.loss.backward()
    assert output.overflow is not None and not output.overflow
    for ours, theirs in zip(half.plan.units, full.plan.units, strict=True):
        assert relative_error(_unit_gradient(half, ours), _unit_gradient(full, theirs)) < 0.05, ours.name


def _unit_gradient(net: LocalNetwork, unit: LocalUnit) -> Tensor:
    parameters = [p for s in unit.learns for p in net.segments[s].parameters()] + list(unit.head.parameters())
    return torch.cat([p.grad.flatten().float() for p in parameters if p.grad is not None])


def test_float16_overflow_halves_the_scale_of_the_heads_above() -> None:
    """Only the heads whose windows hold the overflow pay, and the step is flagged."""
    net = networks.network("dgl", precision="fp16")
    assert net.scales is not None
    data = networks.batch(net)
    data = data._replace(images=data.images.float())
    net.scales.scale[1] = 2.0**80
    before = net.scales.scale.clone()
    assert net(data).overflow
    assert net.scales.scale[1] == before[1] / 2
    assert torch.equal(net.scales.scale[2:], before[2:]) and net.scales.scale[0] == before[0]


def test_float16_scales_count_optimizer_steps_and_not_micro_batches() -> None:
    """The first head overflows in the first step; the second head's 2000th clean step is the second one."""
    scales = LossScales([1.0, 1.0])
    scales.clean_steps.fill_(GROWTH_INTERVAL - 2)
    clean, overflow = torch.tensor([False, False]), torch.tensor([True, False])
    skips = [bool(scales.update(flags, last).skip) for flags, last in ((overflow, False), (overflow, False))]
    assert scales.scale.tolist() == [START, START]  # in mid-step nothing moves
    skips.append(bool(scales.update(clean, last=True).skip))
    assert skips == [True, True, False]
    assert scales.scale.tolist() == [START / 2, START]
    for last in (False, False, True):
        assert not scales.update(clean, last).skip
    assert scales.scale.tolist() == [START / 2, START * 2]
    assert scales.clean_steps.tolist() == [1, 0]


def test_bfloat16_gradients_are_float32_and_close() -> None:
    net = networks.network("mlm-2")
    data = networks.batch(net, size=64)
    data = data._replace(images=data.images.float())
    low = LocalNetwork(net.backbone, net.segments, net.plan, "bf16").train()
    reference, ours = networks.routed(net, data), networks.routed(low, data)
    for gradient in ours.values():
        assert gradient.dtype == torch.float32
    both = [torch.cat([g[n].flatten() for n in reference]) for g in (ours, reference)]
    assert relative_error(*both) < 0.1


def test_channels_last_changes_the_layout_only() -> None:
    reference = networks.network("loco").double()
    net = networks.network("loco", channels_last=True).double()
    data = networks.batch(net)
    layouts = []
    net.backbone.get_submodule("layer3.1").register_forward_hook(
        lambda module, inputs, output: layouts.append(output.is_contiguous(memory_format=torch.channels_last))
    )
    ours, theirs = networks.routed(net, data), networks.routed(reference, data)
    net(data)
    assert layouts == [True, True]
    for name in theirs:
        assert relative_error(ours[name], theirs[name]) < 1e-10, name


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([(0, 6, 1.0)], r"window \[0..6\] does not fit: the network has segments 0..5"),
        ([(2, 1, 1.0)], r"window \[2..1\]"),
        ([(0, 4, 1.0)], "no unit trains segment 5"),
        ([(0, 5, 0.0)], "weight 0.0 must be above 0"),
    ],
)
def test_impossible_plans_are_refused(units: list[tuple[int, int, float]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Plan(tuple(LocalUnit(f"u{i}", a, b, Head(), w) for i, (a, b, w) in enumerate(units)), 6)
