"""Twenty steps of every method in float64 give the losses that were recorded.

A change that is not meant to alter numbers must not alter these. After one that is:

    uv run python -m tests.training.test_golden
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from framework.execution import LocalNetwork
from tests.support import networks
from tests.support.marks import slow

GOLDEN = Path(__file__).parent / "golden" / "losses.json"
STEPS = 20


def losses(case: str) -> list[list[float]]:
    """Unit losses of every step. Weights and images come from NumPy, whose streams don't change between releases."""
    net = networks.network(case, "resnet8").double()
    _initialize(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    history = []
    for step in range(STEPS):
        torch.manual_seed(step)  # of noise
        output = net(networks.batch(net, seed=step % 4))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        history.append(output.unit_losses.tolist())
    return history


@torch.no_grad()
def _initialize(net: LocalNetwork) -> None:
    generator = np.random.default_rng(0)
    copies = [
        buffer
        for head in net.heads.values()
        for buffer in head.buffers()
        if buffer.ndim == 4 and len(buffer) > 1
    ]
    for weight in [*net.parameters(), *copies]:
        if weight.ndim > 1:
            fan_in = weight[0].numel()
            values = generator.standard_normal(tuple(weight.shape)) * np.sqrt(2 / fan_in)
            weight.copy_(torch.from_numpy(values))
    queues = [b for head in net.heads.values() for name, b in head.named_buffers() if name.endswith("queue")]
    for queue in queues:
        queue.copy_(torch.from_numpy(generator.standard_normal(tuple(queue.shape))))
    if net.teacher is not None:
        net.teacher.catch_up(net.segments)


# Of an objective in other windows, and of heads whose parts others have.
FURTHER = ("loco-barlow", "loco-soft", "gim-byol", "simclr-mocov3", "loco-simsiam", "man", "mlm-3")


@pytest.mark.parametrize("case", [*(c for c in networks.GOLDEN if c not in FURTHER), *slow(FURTHER)])
def test_losses_are_the_recorded_ones(case: str) -> None:
    recorded = json.loads(GOLDEN.read_text())[case]
    now = losses(case)
    assert np.allclose(now, recorded, rtol=1e-6, atol=0)
    if case != "loco-moco":  # whose queue comes to hold the same four batches
        assert np.mean(now[-4:]) < np.mean(now[:4])


if __name__ == "__main__":
    torch.set_num_threads(1)
    GOLDEN.write_text(json.dumps({case: losses(case) for case in networks.GOLDEN}, indent=None) + "\n")
