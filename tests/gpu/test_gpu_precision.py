"""bf16, fp16 and channels-last order of every method beside float64, on a network of the papers' size."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from framework.execution import LocalNetwork
from tests.support import networks, pipelines
from tests.support.networks import OF_METHODS, relative_error
from tests.support.pipelines import Run

pytestmark = pytest.mark.gpu

#: largest error of all gradients together. On a CPU, ResNet-14: bf16 up to 0.32, fp16 0.13, both in channels-last order
#: the same, fp32 in that order up to 0.01
TOLERANCES = {"fp32": 0.05, "bf16": 0.6, "fp16": 0.3}
CASES = [*OF_METHODS.values(), "loco-moco", "gim-byol", "mlaan-code", "loco-barlow"]


def step(net: LocalNetwork, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit losses and all gradients, in float64."""
    torch.manual_seed(0)
    run = Run("", micro_batches=4)  # of 8 images
    parts = pipelines.micro_batches(run, net, 0)
    images = torch.cat([part.images.unflatten(0, (net.plan.views, -1)) for part in parts], 1).flatten(0, 1)
    labels = torch.cat([part.labels for part in parts]) if net.plan.supervised else None  # type: ignore[misc]
    data = networks.on(device, parts[0]._replace(images=images, labels=labels), dtype)
    output = net.to(device)(data)
    output.loss.backward()
    assert output.overflow is None or not output.overflow
    gradients = [p.grad.double().flatten() for p in net.parameters() if p.grad is not None]
    return output.unit_losses.double(), torch.cat(gradients)


@lru_cache(maxsize=1)
def reference(case: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in float64."""
    return step(networks.network(case).double(), device, torch.float64)


@pytest.mark.parametrize(
    ("case", "precision", "channels_last"),
    [
        pytest.param(case, precision, last, id=f"{case}-{precision}{'-channels_last' if last else ''}")
        for case in CASES
        for precision, last in (("fp32", True), ("bf16", False), ("bf16", True), ("fp16", False))
    ],
)
def test_gradients_are_close_to_float64(
    device: torch.device,
    drawn_on_the_cpu: None,
    no_tf32: None,
    case: str,
    precision: str,
    channels_last: bool,
) -> None:
    losses, gradients = reference(case, device)
    net = networks.network(case, precision=precision, channels_last=channels_last)
    if net.scales is not None:
        net.scales.scale.mul_(2.0**-8)  # as after some steps: at first they may overflow
    found = step(net, device, torch.float32)
    assert relative_error(found[1], gradients) < TOLERANCES[precision]
    assert torch.allclose(found[0], losses, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("case", ["simclr", "gim", "loco", "dgl", "mlaan"])
def test_a_step_of_a_large_network(gpu: torch.device, case: str) -> None:
    """ResNet-50 of 128 pixels in bf16 and channels-last order, as it is trained: losses as in float32."""
    found = []
    for precision in ("fp32", "bf16"):
        low = precision == "bf16"
        net = networks.network(case, "resnet50", 128, precision=precision, channels_last=low).to(gpu)
        data = networks.on(gpu, networks.batch(net, 16, 128), torch.float32)
        output = net(data)
        output.loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)
        found.append(output.unit_losses)
    assert torch.allclose(*found, rtol=0.1, atol=0.1)
