"""Compiled segments on a GPU have the gradients of the segments as they are."""

from __future__ import annotations

import copy

import pytest
import torch

from framework.execution.compilation import has_compiler
from tests.support import networks
from tests.support.networks import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler"),
]


@pytest.mark.parametrize("case", ["gim", "mlaan", "loco", "dgl"])
def test_compiled_segments_have_the_same_gradients(gpu: torch.device, no_tf32: None, case: str) -> None:
    """All gradients of two steps together, in float32. ``-m soak`` has the same for a CPU."""
    net = networks.network(case, "resnet8").to(gpu)
    data, eager = networks.on(gpu, networks.batch(net), torch.float32), copy.deepcopy(net)
    net.compile_segments()
    for _ in range(2):
        losses = [n(data).unit_losses for n in (net, eager)]
        assert torch.allclose(*losses, rtol=1e-3)
        both = [networks.gradients(n) for n in (net, eager) if n(data).loss.backward() is None]
        found, expected = (torch.cat([g.flatten() for g in gradients.values()]) for gradients in both)
        assert relative_error(found, expected) < 1e-2
