"""Steps that are replayed from a CUDA graph are those that are launched one by one."""

from __future__ import annotations

import copy

import pytest
import torch

from framework.execution.graph import RecordedStep
from tests.support import networks
from tests.support.networks import CASES, relative_error

pytestmark = pytest.mark.gpu

#: what is drawn on the host can't be in a graph
RECORDABLE = [case for case in CASES if case not in ("mim", "blockwise")]
LOW = ["simclr", "loco", "loco-moco", "dgl", "infopro", "mlaan"]


@pytest.mark.parametrize(
    ("case", "precision"), [*((case, "fp64") for case in RECORDABLE), *((case, "bf16") for case in LOW)]
)
def test_a_graph_repeats_the_step(gpu: torch.device, case: str, precision: str) -> None:
    """Three batches, with an update after each: losses, gradients, statistics, teachers."""
    dtype = torch.float64 if precision == "fp64" else torch.float32
    net = networks.network(case, precision="fp32" if precision == "fp64" else precision).to(gpu, dtype)
    eager = copy.deepcopy(net)
    batches = [networks.on(gpu, networks.batch(net, seed=seed), dtype) for seed in range(3)]
    recorded = RecordedStep(net, batches[0])
    tolerance = 1e-6 if precision == "fp64" else 0.05
    for data in batches:
        recorded.run(data)
        output = eager(data)
        output.loss.backward()
        assert torch.allclose(recorded.unit_losses, output.unit_losses, rtol=tolerance)
        pairs = [
            (p, q) for p, q in zip(net.parameters(), eager.parameters(), strict=True) if q.grad is not None
        ]
        found = torch.cat([recorded.gradients[ours].flatten() for ours, _ in pairs])
        expected = torch.cat([theirs.grad.flatten() for _, theirs in pairs])
        assert relative_error(found, expected) < tolerance
        with torch.no_grad():
            for ours, theirs in pairs:
                ours -= 0.01 * recorded.gradients[ours]
                theirs -= 0.01 * theirs.grad
        eager.zero_grad()
    for (name, ours), theirs in zip(net.named_buffers(), eager.buffers(), strict=True):
        assert torch.allclose(ours.double(), theirs.double(), rtol=tolerance, atol=tolerance), name
