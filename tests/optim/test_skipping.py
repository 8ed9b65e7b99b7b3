"""Steps that only the device knows to be skipped equal steps that are not made."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from framework.optim import LARS, SGD, AdamW, build_optimizer
from tests.support.host_reads import META, no_host_reads

SKIPPED = (True, False, False, True, True, False, False)


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3))


def optimizer(net: nn.Module, name: str) -> LARS | SGD | AdamW:
    return build_optimizer(net, name=name, weight_decay=0.1, nesterov=name == "sgd")


def train(net: nn.Module, name: str, on_device: bool) -> LARS | SGD | AdamW:
    """Steps on random gradients, NaN in those that are skipped; the last layer has none in one that is made."""
    stepper = optimizer(net, name)
    for step, skip in enumerate(SKIPPED):
        generator = torch.Generator().manual_seed(step)
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=generator) * (torch.nan if skip else 1.0)
        if step == 2:
            net[-1].zero_grad()
        for group in stepper.param_groups:
            group["lr"] = 0.1 / (1 + step)
        if on_device:
            stepper.skip = torch.tensor(skip)
        if on_device or not skip:
            stepper.step()
    return stepper


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_they_leave_weights_state_and_counters_alone_to_the_last_bit(name: str) -> None:
    """AdamW's own steps are PyTorch's."""
    ours, theirs = layers(), layers()
    mine, other = train(ours, name, True), train(theirs, name, False)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q) and p.isfinite().all()
        assert mine.state[p].keys() == other.state[q].keys()
        for key, value in mine.state[p].items():
            assert torch.equal(value, other.state[q][key]), key


def test_a_network_whose_first_steps_are_all_skipped_is_as_it_was() -> None:
    net, before = layers(), layers()
    for name in ("lars", "sgd", "adamw"):
        stepper = optimizer(net, name)
        stepper.skip = torch.tensor(True)
        for p in net.parameters():
            p.grad = torch.full_like(p, torch.inf)
        stepper.step()
        assert not any(value.any() for state in stepper.state.values() for value in state.values())
    assert all(map(torch.equal, net.parameters(), before.parameters()))


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_the_host_does_not_read_whether_they_are(name: str) -> None:
    net = layers().to(META)
    stepper = optimizer(net, name)
    with no_host_reads():
        for _ in range(2):
            for p in net.parameters():
                p.grad = torch.ones_like(p)
            stepper.skip = torch.zeros((), dtype=torch.bool, device=META)
            stepper.step()
