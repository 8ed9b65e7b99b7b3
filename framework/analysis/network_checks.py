"""Whether a network is cut rightly, whether methods train it, and what that saves: one row a network."""

from __future__ import annotations

import copy
import time
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from framework.cost.counting import peak_of
from framework.data.batch import Batch
from framework.execution import LocalNetwork
from framework.execution.naive import naive_gradients
from framework.local import NetworkInfo, methods
from framework.network import Segment, create, cut
from framework.network.structure import image_side, run_features
from framework.runtime.errors import UserError

#: method -> the one on top of the whole network that it is compared with
METHODS = {"gim": "simclr", "loco": "simclr", "dgl": "bp", "mlaan": "bp"}
CLASSES = 10
#: networks with more parameters train in float32, and are not compared with the definition
LARGE = 30_000_000
#: images of which the memory is counted
IMAGES = 8
#: sides of images, of which the first that a network takes is used
SIDES = (64, 96, 128, 192, 224, 240, 256, 288, 320, 384, 448, 512, 32)
#: tried at the creation of networks that take none of the smaller ones otherwise
SMALL = (96, 112, 128)


def check(name: str) -> dict[str, Any]:
    """Cut a timm network at stage and block, compare with the whole, train it, count the memory.

    All but the memory is done with small images, since equality does not hang on their size.

    Args:
        name: timm's.

    Returns:
        A row of the table; ``reason`` says why it can't be cut, or which methods have no heads for it by default,
        ``faults`` what is wrong with what was cut.
    """
    row: dict[str, Any] = {"network": name, "reason": "", "faults": ""}
    torch.manual_seed(0)
    usual = create(name)
    row["parameters_millions"] = round(sum(p.numel() for p in usual.parameters()) / 1e6, 2)
    try:
        network, side = _for_small_images(name, usual)
        start = time.process_time()
        parts = {at: cut(network, at, image_size=side) for at in ("stage", "block")}
    except UserError as error:
        return {**row, "reason": str(error)}
    row |= {"image_size": side, "cut_seconds": round((time.process_time() - start) / 2, 2)}
    row |= {f"{at}s": len(segments) for at, segments in parts.items()}
    faults = _unequal(network, parts, side)
    info = NetworkInfo.of(parts["stage"], side, CLASSES)
    faults += _features(_planned(info, "bp"), side)
    refused = {}
    for method in METHODS:
        try:
            faults += [f"{method}: {fault}" for fault in _training(_planned(info, method), side)]
        except UserError as error:
            refused[method] = f"{method}: {error}"
    row |= {"reason": "; ".join(refused.values()), "faults": "; ".join(faults)}
    return row | _savings(usual, side, [method for method in METHODS if method not in refused])


def cut_only(name: str) -> dict[str, Any]:
    """Whether a timm network can be cut at block, for images of its usual size: nothing is computed, nothing compared.

    Args:
        name: timm's.

    Returns:
        A row of the table without what needs computing.
    """
    row: dict[str, Any] = {"network": name, "reason": "", "faults": ""}
    with torch.device("meta"):
        network = create(name)
    row["parameters_millions"] = round(sum(p.numel() for p in network.parameters()) / 1e6, 2)
    start = time.process_time()
    try:
        segments = cut(network, "block")
    except UserError as error:
        return {**row, "reason": str(error)}
    row["cut_seconds"] = round(time.process_time() - start, 2)
    stages = [stage.name for stage in segments[-1].stages]
    for names in (stages, [segment.name for segment in segments]):
        if len(set(names)) < len(names):
            row["faults"] = f"two segments have one name: {', '.join(names)}"
    return {**row, "stages": len(stages), "blocks": len(segments)}


def send_row(name: str, only_cut: bool, to: Connection) -> None:
    """For a process of its own: ``check`` or ``cut_only``, and whatever goes wrong as a fault."""
    try:
        to.send(cut_only(name) if only_cut else check(name))
    except Exception as error:
        to.send({"network": name, "reason": "", "faults": f"{type(error).__name__}: {error}"})


def _for_small_images(name: str, usual: nn.Module) -> tuple[nn.Module, int]:
    """The network, and a side of images; one for small images, where it says at its creation how large they are."""
    side = image_side(usual, SIDES)
    for smaller in SMALL if side > SMALL[-1] else ():
        try:
            network = create(name, img_size=smaller)
            return network, image_side(network, (smaller,))
        except UserError:
            continue
    return usual, side


def _savings(network: nn.Module, side: int, names: list[str]) -> dict[str, Any]:
    """How many times less memory activations take than with one loss on top, for images as the network was made for."""
    usual = (getattr(network, "pretrained_cfg", None) or {}).get("input_size", (3, side, side))[-1]
    side = image_side(network, (usual, side))
    info = NetworkInfo.of(cut(network, "stage", image_size=side), side, CLASSES)
    wanted = {*names, *(METHODS[name] for name in names)}
    peaks = {name: peak_of(_planned(info, name).train(), IMAGES, side) for name in wanted}
    savings = {f"saving_{name}": round(peaks[METHODS[name]] / peaks[name], 2) for name in names}
    return {"memory_size": side, **savings}


def _planned(info: NetworkInfo, method: str) -> LocalNetwork:
    """A copy of the segments and their network, trained by a method."""
    torch.manual_seed(0)
    info = replace(info, segments=copy.deepcopy(info.segments))
    chosen = methods.load(method)
    plan = chosen.plan(info, chosen.Options())
    return LocalNetwork(info.segments[0].backbone, info.segments, plan)


@torch.no_grad()
def _unequal(network: nn.Module, parts: dict[str, list[Segment]], side: int) -> list[str]:
    """Cuts and modes in which the segments compute something else than the network, with the same random numbers."""
    found = []
    images = _images(side, 2)
    state = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    for training in (True, False):
        network.train(training)
        torch.manual_seed(1)
        whole = run_features(network, images)
        for at, segments in parts.items():
            network.load_state_dict(state)
            torch.manual_seed(1)
            x = images
            for segment in segments:
                x = segment(x)
            if not torch.equal(x, whole):
                mode = "training" if training else "evaluation"
                found.append(f"{at}, {mode}: differs by {_error(x, whole):.1e}")
        network.load_state_dict(state)
    return found


@torch.no_grad()
def _features(net: LocalNetwork, side: int) -> list[str]:
    """Whether the features are those that the network gives, or the mean of its maps or tokens."""
    net.eval()
    images = _images(side, 2)
    expected = net.backbone(images)
    if expected.ndim > 2:
        expected = net.segments[-1].to_map(expected).mean((2, 3))
    found = net.features(images)
    if found.shape != expected.shape:
        return [f"features {tuple(found.shape[1:])}, timm's {tuple(expected.shape[1:])}"]
    return [] if _error(found, expected) < 1e-5 else [f"features differ by {_error(found, expected):.1e}"]


def _training(net: LocalNetwork, side: int) -> list[str]:
    """A step: finite, every weight gets a gradient, and in float64 it is the definition's."""
    small = sum(p.numel() for p in net.backbone.parameters()) <= LARGE
    net = (net.double() if small else net).train()
    batch = _batch(net, side)
    state = torch.get_rng_state()
    with _AllFloat64() if small else nullcontext():
        loss = net(batch).loss
    loss.backward()
    gradients = {n: p.grad for n, p in net.named_parameters() if p.requires_grad}
    if not torch.isfinite(loss):
        return [f"loss {float(loss)}"]
    if missing := [n for n, gradient in gradients.items() if gradient is None]:
        return [f"{missing[0]} gets no gradient"]
    if not small or not torch.equal(state, torch.get_rng_state()):
        return []  # random numbers are drawn in another order there
    with _AllFloat64():
        _, expected = naive_gradients(net, batch)
    names = {p: n for n, p in net.named_parameters()}
    for parameter, gradient in expected.items():
        own = gradients[names[parameter]]
        assert own is not None
        scale = max(float(gradient.abs().max()), 1e-9)
        if float((own - gradient).abs().max()) > 1e-8 * max(1.0, scale):
            return [f"gradient of {names[parameter]} differs by {_error(own, gradient):.1e}"]
    return []


class _AllFloat64(TorchFunctionMode):
    """``x.float()`` gives float64: some networks compute a part in float32, whose rounding would hide errors."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **(kwargs or {})) if func is not Tensor.float else Tensor.double(*args)


def _images(side: int, count: int) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(3))


def _batch(net: LocalNetwork, side: int) -> Batch:
    views = net.plan.views
    images = _images(side, 2 * views).to(next(net.backbone.parameters()).dtype)
    return Batch(images, torch.arange(2) if net.plan.supervised else None, views)


def _error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-30))
