"""Noise between segments."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from framework.engines.base import EngineSettings
from framework.engines.cuda_graph import build
from framework.execution.noise import Noise
from framework.runtime.errors import UserError
from tests.support import networks


def test_noise_is_a_quarter_of_the_standard_deviation_and_the_gradient_flows_through_it() -> None:
    x = (3 + 2 * torch.randn(64, 8, 9, 9, dtype=torch.float64)).requires_grad_()
    noise = Noise(0.25, seed=5)
    added = noise.on(x, 2) - x
    assert float(added.std() / x.std()) == pytest.approx(0.25, abs=0.005)
    assert abs(float(added.mean())) < 0.01
    (gradient,) = torch.autograd.grad(noise.on(x, 2).square().sum(), x)
    y, normal = x.detach(), (added / (0.25 * x.std())).detach()
    noisy = y + 0.25 * y.std() * normal
    slope = (y - y.mean()) / (y.std() * (y.numel() - 1))  # of the standard deviation
    expected = 2 * noisy + 0.25 * (2 * noisy * normal).sum() * slope
    assert torch.allclose(gradient, expected)


def test_noise_differs_by_step_micro_batch_and_segment_and_by_nothing_else() -> None:
    x = torch.randn(2, 3, 4, 4)
    noise = Noise(0.25, seed=5, step=7, micro_batch=1)
    same = noise.on(x, 2)
    torch.rand(3)  # what else is drawn doesn't matter
    assert torch.equal(noise.on(x, 2), same)
    others = [
        Noise(0.25, 6, 7, 1).on(x, 2),
        Noise(0.25, 5, 8, 1).on(x, 2),
        noise.of(2).on(x, 2),
        noise.on(x, 3),
    ]
    assert all(not torch.equal(other, same) for other in others)


def test_the_noise_of_a_step_is_that_of_its_seed() -> None:
    """Runs set one for every step, and so repeat the noise when they go on; plain loops set one at the start."""
    torch.manual_seed(3)
    first = Noise.next(0.25, None)
    assert first == Noise(0.25, 3) and Noise.next(0.25, first) == Noise(0.25, 3, step=1)
    torch.manual_seed(4)
    assert Noise.next(0.25, first) == Noise(0.25, 4) and Noise.next(0.0, first) is None


def outputs(*last: bool, quiet: bool = False) -> list[Tensor]:
    net = networks.network("blockwise").double()
    if quiet:
        net.program = dataclasses.replace(net.program, plan=dataclasses.replace(net.plan, noise=0.0))
    torch.manual_seed(3)
    return [net(networks.batch(net)._replace(last=end)).unit_losses for end in last]


def test_a_network_draws_noise_once_a_micro_batch_in_training_only() -> None:
    one, two, three = outputs(False, True, True)
    assert not torch.allclose(one, two) and not torch.allclose(two, three)
    assert torch.equal(one, outputs(True)[0]) and not torch.allclose(one, outputs(True, quiet=True)[0])
    net = networks.network("blockwise").double().eval()
    data = networks.batch(net)
    assert torch.equal(net(data).unit_losses, net(data).unit_losses)


def test_no_graph_repeats_noise() -> None:
    with pytest.raises(UserError, match="would repeat the noise"):
        build(networks.network("blockwise"), lambda net: None, EngineSettings(8))  # type: ignore[arg-type,return-value]
