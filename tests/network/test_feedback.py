"""Feedback alignment against its formulas, in float64: random weights, signs of weights, and the direct way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework.local.methods import dfa
from framework.model import local_network
from framework.network.feedback import use_feedback
from framework.network.layers import GlobalAveragePool
from framework.runtime.errors import UserError
from tests.support import networks
from tests.support.networks import CLASSES


def small() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.ReLU(),
    ]
    return nn.Sequential(*layers, GlobalAveragePool(), nn.Linear(6, 5)).double()


def sent_down(layer: nn.Module, kind: str) -> Tensor:
    """The weights that an error meets on its way down."""
    w = layer.weight.detach()  # type: ignore[union-attr,operator]
    if kind == "random":
        return layer.feedback  # type: ignore[return-value]
    return w / w.abs() * w.square().mean().sqrt()


@pytest.mark.parametrize("kind", ["random", "sign"])
def test_errors_go_down_through_other_weights(kind: str) -> None:
    plain, net = small(), small()
    use_feedback(net, kind)  # type: ignore[arg-type]
    net = net.double()
    assert list(net.state_dict()) == list(plain.state_dict())
    x, labels = torch.randn(7, 3, 9, 9, dtype=torch.float64), torch.arange(7) % 5
    images = x.clone().requires_grad_()
    logits = net(images)
    assert torch.allclose(logits, plain(x))
    F.cross_entropy(logits, labels).backward()

    a1 = F.conv2d(x, net[0].weight, None, 2, 1)  # type: ignore[arg-type]
    a2 = F.conv2d(a1.relu(), net[2].weight, net[2].bias, groups=2)  # type: ignore[arg-type]
    pooled = a2.relu().mean((2, 3))
    e = (logits.softmax(1) - F.one_hot(labels, 5)) / 7
    assert torch.allclose(net[5].weight.grad, e.T @ pooled) and torch.allclose(net[5].bias.grad, e.sum(0))  # type: ignore[arg-type]
    d2 = (e @ sent_down(net[5], kind))[:, :, None, None] / (a2.shape[2] * a2.shape[3]) * (a2 > 0)
    assert torch.allclose(net[2].bias.grad, d2.sum((0, 2, 3)))  # type: ignore[arg-type]
    own = torch.nn.grad.conv2d_weight(a1.relu(), net[2].weight.shape, d2, groups=2)  # type: ignore[arg-type]
    assert torch.allclose(net[2].weight.grad, own)  # type: ignore[arg-type]
    d1 = F.conv_transpose2d(d2, sent_down(net[2], kind), groups=2) * (a1 > 0)
    assert torch.allclose(net[0].weight.grad, torch.nn.grad.conv2d_weight(x, net[0].weight.shape, d1, 2, 1))  # type: ignore[arg-type]
    below = F.conv_transpose2d(d1, sent_down(net[0], kind), None, 2, 1)
    assert images.grad is not None and torch.allclose(images.grad, below)


def test_random_weights_are_those_of_the_layers_name_and_of_hes_size() -> None:
    one, other = small(), small()
    for net in (one, other):
        use_feedback(net, "random")
    assert torch.equal(one[0].feedback, other[0].feedback)  # type: ignore[arg-type]
    wide = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3))
    use_feedback(wide, "random")
    assert float(wide[0].feedback.std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)  # type: ignore[operator]
    assert not torch.equal(wide[0].feedback, wide[1].feedback)  # type: ignore[arg-type]


def test_the_direct_way_gives_each_segment_the_error_of_the_logits() -> None:
    torch.manual_seed(0)
    net = local_network("resnet8", "dfa", dfa.Options(), image_size=16, num_classes=CLASSES).double().train()
    data = networks.batch(net)
    output = net(data)
    output.loss.backward()
    x, inputs, outputs = data.images, [], []
    for segment in net.segments:
        inputs.append(x.detach())
        outputs.append(segment(inputs[-1]))
        x = outputs[-1]
    top = net.plan.units[-1].head
    logits = top.embed(outputs[-1].detach())
    e = (logits.softmax(1) - F.one_hot(data.labels, CLASSES)) / len(logits)  # type: ignore[arg-type]
    for s, segment in enumerate(net.segments[:-1]):
        direct = (e @ net.plan.units[s].head.matrix).view_as(outputs[s])  # type: ignore[operator]
        weights = list(segment.parameters())
        for p, g in zip(weights, torch.autograd.grad(outputs[s], weights, direct), strict=True):
            assert p.grad is not None and torch.allclose(p.grad, g, rtol=1e-9, atol=1e-13)
    weights = list(net.segments[-1].parameters())
    loss = F.cross_entropy(top.embed(outputs[-1]), data.labels)  # type: ignore[arg-type]
    for p, g in zip(weights, torch.autograd.grad(loss, weights), strict=True):
        assert p.grad is not None and torch.allclose(p.grad, g, rtol=1e-9, atol=1e-13)
    assert torch.allclose(output.unit_losses[-1], loss)
    assert torch.isfinite(net.eval()(data).unit_losses).all()


def test_precision_is_that_of_autocast() -> None:
    net = small().float()
    use_feedback(net, "random")
    x = torch.randn(2, 3, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(x)
    logits.float().square().sum().backward()
    assert logits.dtype == torch.bfloat16 and net[0].weight.grad.dtype == torch.float32  # type: ignore[union-attr]


def test_other_convolutions_are_refused() -> None:
    class Odd(nn.Conv2d):
        pass

    with pytest.raises(UserError, match="no backward pass for 0, a Odd"):
        use_feedback(nn.Sequential(Odd(3, 3, 1)), "sign")
    with pytest.raises(UserError, match="padding other than by zeros"):
        use_feedback(nn.Sequential(nn.Conv2d(3, 3, 3, padding="same")), "sign")
