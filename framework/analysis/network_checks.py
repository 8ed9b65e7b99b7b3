"""Whether a network is cut rightly, whether methods train it, and what that saves: one row a network."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from framework.config.recipe import Data, Method, Network, Recipe
from framework.cost.counting import peak_bytes
from framework.data.batch import Batch
from framework.execution import LocalNetwork
from framework.execution.naive import naive_gradients
from framework.local import methods
from framework.model import local_network
from framework.network import Segment, create, cut
from framework.network.structure import image_side
from framework.runtime.errors import UserError

METHODS = ("gim", "loco", "dgl", "mlaan")
CLASSES = 10
#: networks with more parameters train in float32, and are not compared with the definition
LARGE = 30_000_000
#: sides of images, of which the first that a network takes is used
SIDES = (64, 96, 128, 192, 224, 240, 256, 288, 320, 384, 448, 512)


def check(name: str) -> dict[str, Any]:
    """Cut a timm network at stage and block, compare with the whole, train it, count the memory.

    Args:
        name: timm's.

    Returns:
        A row of the table; ``reason`` says why a network can't be cut, ``faults`` what is wrong with one that is.
    """
    row: dict[str, Any] = {"network": name, "reason": "", "faults": ""}
    torch.manual_seed(0)
    network = create(name)
    row["parameters_millions"] = round(sum(p.numel() for p in network.parameters()) / 1e6, 2)
    start = time.process_time()
    try:
        side = image_side(network, SIDES)
        start = time.process_time()
        parts = {at: cut(network, at, image_size=side) for at in ("stage", "block")}
    except UserError as error:
        return {**row, "reason": str(error)}
    row |= {"image_size": side, "cut_seconds": round((time.process_time() - start) / 2, 2)}
    row |= {f"{at}s": len(segments) for at, segments in parts.items()}
    faults = [fault for at, segments in parts.items() for fault in _unequal(network, at, segments, side)]
    faults += _features(name, side)
    for method in METHODS:
        faults += _training(name, method, side)
        row[f"saving_{method}"] = _saving(name, method, side)
    return {**row, "faults": "; ".join(faults)}


@torch.no_grad()
def _unequal(network: torch.nn.Module, at: str, segments: list[Segment], side: int) -> list[str]:
    """Modes in which the segments compute something else than the network, with the same random numbers."""
    found = []
    images = _images(side, 2)
    for training in (True, False):
        network.train(training)
        state = {key: tensor.clone() for key, tensor in network.state_dict().items()}
        torch.manual_seed(1)
        whole = network.forward_features(images)  # type: ignore[operator]
        network.load_state_dict(state)
        torch.manual_seed(1)
        x = images
        for segment in segments:
            x = segment(x)
        network.load_state_dict(state)
        if not torch.equal(x, whole):
            found.append(
                f"{at}, {'training' if training else 'evaluation'}: differs by {_error(x, whole):.1e}"
            )
    return found


@torch.no_grad()
def _features(name: str, side: int) -> list[str]:
    """Whether the features are those that timm's network gives."""
    torch.manual_seed(0)
    net = local_network(create(name), "bp", image_size=side, num_classes=CLASSES).eval()
    images = _images(side, 2)
    expected = net.backbone(images)
    found = net.features(images)
    if found.shape != expected.shape:
        return [f"features {tuple(found.shape[1:])}, timm's {tuple(expected.shape[1:])}"]
    return [] if _error(found, expected) < 1e-5 else [f"features differ by {_error(found, expected):.1e}"]


def _training(name: str, method: str, side: int) -> list[str]:
    """A step: finite, every weight gets a gradient, and in float64 it is the definition's."""
    torch.manual_seed(0)
    try:
        net = local_network(create(name), method, image_size=side, num_classes=CLASSES).train()
    except UserError as error:
        return [f"{method}: {error}"]
    small = sum(p.numel() for p in net.backbone.parameters()) <= LARGE
    net = net.double() if small else net
    batch = _batch(net, side)
    state = torch.get_rng_state()
    loss = net(batch).loss
    loss.backward()
    gradients = {n: p.grad for n, p in net.named_parameters() if p.requires_grad}
    if not torch.isfinite(loss):
        return [f"{method}: loss {float(loss)}"]
    if missing := [n for n, gradient in gradients.items() if gradient is None]:
        return [f"{method}: {missing[0]} gets no gradient"]
    if not small or not torch.equal(state, torch.get_rng_state()):
        return []  # random numbers are drawn in another order there
    _, expected = naive_gradients(net, batch)
    names = {p: n for n, p in net.named_parameters()}
    for parameter, gradient in expected.items():
        own = gradients[names[parameter]]
        assert own is not None
        scale = max(float(gradient.abs().max()), 1e-9)
        if float((own - gradient).abs().max()) > 1e-8 * max(1.0, scale):
            return [f"{method}: gradient of {names[parameter]} differs by {_error(own, gradient):.1e}"]
    return []


def _saving(name: str, method: str, side: int) -> float | str:
    """How many times less memory activations take than with one loss on top."""
    try:
        own, whole = peak_bytes(_recipe(name, method, side), CLASSES, 8)
    except UserError:
        return ""
    return round(whole / own, 2)


def _recipe(name: str, method: str, side: int) -> Recipe:
    return Recipe(
        name=name,
        network=Network(name=name),
        method=Method(method, methods.load(method).Options()),
        data=Data(path="unused", image_size=side),
    )


def _images(side: int, count: int) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(3))


def _batch(net: LocalNetwork, side: int) -> Batch:
    views = net.plan.views
    images = _images(side, 2 * views).to(next(net.backbone.parameters()).dtype)
    return Batch(images, torch.arange(2) if net.plan.supervised else None, views)


def _error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-30))
