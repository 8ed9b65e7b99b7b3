"""Every method on a GPU beside the CPU in float64: weights, momenta, statistics, teachers, masks, losses."""

from __future__ import annotations

import copy

import pytest
import torch

from framework.execution.naive import naive_gradients
from framework.local.methods import names
from tests.support import networks, pipelines
from tests.support.networks import CASES, relative_error
from tests.support.pipelines import Run

pytestmark = pytest.mark.gpu

#: beyond what sums in another order make of three steps
TOLERANCE = 1e-6


def test_every_method_is_among_the_cases() -> None:
    assert {method for method, _, _ in CASES.values()} == set(names())


@pytest.mark.parametrize("case", CASES)
def test_three_steps_are_the_cpus(device: torch.device, drawn_on_the_cpu: None, case: str) -> None:
    """Of LARS: whatever is in a checkpoint, teachers and queues among it, and the losses."""
    run = Run(case, micro_batches=1, optimizer="lars")
    errors = pipelines.errors(pipelines.alone(run, device), pipelines.alone(run))
    assert max(errors.values()) < TOLERANCE, max(errors, key=lambda name: errors[name])


@pytest.mark.parametrize("case", CASES)
def test_float32_is_close_to_float64(
    device: torch.device, drawn_on_the_cpu: None, no_tf32: None, case: str
) -> None:
    """All gradients of a step on 8 images. On a CPU 2e-4 is the most, most are below 1e-5."""
    net = networks.network(case).double().to(device)
    data = networks.on(device, pipelines.micro_batches(Run(case), net, 0)[0])
    expected = networks.routed(net, data)
    found = networks.routed(networks.network(case).to(device), networks.on(device, data, torch.float32))
    both = [torch.cat([g[name].double().flatten() for name in expected]) for g in (found, expected)]
    assert relative_error(*both) < 1e-2


@pytest.mark.parametrize("case", ["mim", "blockwise"])
def test_what_is_drawn_on_the_device_is_drawn_again(device: torch.device, case: str) -> None:
    """Masks and noise: the routed step sees those of the definition, and the next step others."""
    net = networks.network(case).double().to(device)
    literal, data = copy.deepcopy(net), networks.on(device, networks.batch(net))
    torch.manual_seed(1)
    output = net(data)
    output.loss.backward()
    torch.manual_seed(1)
    losses, gradients = naive_gradients(literal, data)
    assert torch.allclose(output.unit_losses, torch.stack(losses), rtol=1e-9)
    for ours, theirs in zip(net.parameters(), literal.parameters(), strict=True):
        if ours.requires_grad:
            assert ours.grad is not None
            assert (ours.grad - gradients[theirs]).norm() < 1e-6 * gradients[theirs].norm() + 1e-12
    assert not torch.allclose(output.unit_losses, net(data).unit_losses, rtol=1e-6)


def test_masks_leave_what_their_rule_says(device: torch.device) -> None:
    net = networks.network("mim").to(device)
    data = networks.on(device, networks.batch(net), torch.float32)
    net(data)
    rule, visible = net.plan.masking, net.masked(data).visible
    assert rule is not None and visible is not None
    assert visible.shape == (len(data.images), rule.visible) and visible.device.type == device.type
    assert (visible.diff(dim=1) > 0).all() and visible.min() >= 0 and visible.max() < rule.patches
