"""What ``bench_step`` times: networks of every method from the same weights, and their steps; and how."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from framework.cost.activations import LiveActivations
from framework.cost.flops import Flops
from framework.data.batch import Batch
from framework.execution.graph import RecordedStep
from framework.execution.local_network import LocalNetwork
from framework.execution.naive import naive_gradients
from framework.local import LocalUnit
from framework.local.heads import Classifier, Projection
from framework.local.methods import auglocal, bp, dgl, gim, hpff, infopro, loco, man, mlaan, simclr
from framework.local.published import ObjectiveName
from framework.local.trunks import TRUNKS
from framework.model import local_network
from framework.network import Cut, Segment
from framework.runtime.errors import UserError

CLASSES = 10
CONTRASTIVE = ("simclr", "gim", "loco")
OBJECTIVES: tuple[ObjectiveName, ...] = ("moco", "mocov3", "byol", "simsiam")
HEADS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(CONTRASTIVE, ("paper", "gap", *OBJECTIVES)),
    **dict.fromkeys(("dgl", "infopro"), ("paper", "gap", *TRUNKS)),
    **dict.fromkeys(("bp", "auglocal", "man", "hpff", "mlm", "lam", "mlaan"), ("paper",)),
}
STEPS = 10  # in a round on a GPU, where one step of milliseconds would be noise


def check(method: str, head: str) -> None:
    """Refuse a head that the method would not have.

    Raises:
        UserError: there is no such method, or it takes other heads.
    """
    method, _, again = method.partition("+")
    if method not in HEADS:
        raise UserError(f"--method {method}: must be among {', '.join(HEADS)}")
    if again not in ("", "segment", "block"):
        raise UserError(f"--method {method}+{again}: what is run again must be segment or block")
    if head not in HEADS[method]:
        raise UserError(f"--head {head}: for --method {method} must be {' or '.join(HEADS[method])}")


def options(method: str, head: str, window: int) -> Any:
    """The method's options: its own head (``paper``), pooling and linear (``gap``), an objective, or a classifier."""
    contrast: Any = {"head": Projection(layers=1)} if head == "gap" else {}
    if head in OBJECTIVES:
        contrast = {"head": Projection(conv_blocks=int(method == "loco"), objective=head)}
    kind: Any = "linear" if head == "gap" else head
    classify: Any = {} if head == "paper" else {"head": Classifier(kind)}
    return {
        "bp": lambda: bp.Options(),
        "simclr": lambda: simclr.Options(**contrast),
        "gim": lambda: gim.Options(**contrast),
        "loco": lambda: loco.Options(window=window, **contrast),
        "dgl": lambda: dgl.Options(**classify),
        "infopro": lambda: infopro.Options(**classify),
        "auglocal": lambda: auglocal.Options(),
        "man": lambda: man.Options(),
        "hpff": lambda: hpff.Options(),
        "mlm": lambda: mlaan.Options(window=window, lam_on="none"),
        # with the authors' two copies, as in the recorded rows; one that is pulled computes less
        "lam": lambda: mlaan.Options(
            window=1, w_indep=1.0, w_casc=0.0, lam_on="independent", lam_weights="two_copies"
        ),
        "mlaan": lambda: mlaan.Options(window=window, lam_weights="two_copies"),
    }[method]()


def build(method: str, arguments: argparse.Namespace, image_size: int, cut: Cut) -> LocalNetwork:
    """The network with the method's units, from the same random weights each time.

    With ``--modules`` the stem is a module of its own for DGL, InfoPro and AugLocal, as in the papers.
    """
    torch.manual_seed(0)
    method, _, again = method.partition("+")
    name = {"mlm": "mlaan", "lam": "mlaan"}.get(method, method)
    opts = options(method, arguments.head, arguments.window)
    classes = 0 if method in CONTRASTIVE else CLASSES
    return local_network(
        arguments.network,
        name,
        opts,
        image_size=image_size,
        num_classes=classes,
        cut=cut,
        stem_as_module=bool(arguments.modules) and method in ("dgl", "infopro", "auglocal"),
        precision=arguments.precision,
        channels_last=arguments.channels_last,
        recompute=again or "none",
    ).train()


def routed_step(network: LocalNetwork, batch: Batch) -> Callable[[], None]:
    """Forward, gradients, SGD with momentum."""
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        network(batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def graphed_step(network: LocalNetwork, batch: Batch) -> Callable[[], None]:
    """The same, gradients from a CUDA graph."""
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    recorded = RecordedStep(network, batch)

    def step() -> None:
        recorded.run(batch)
        for parameter, gradient in recorded.gradients.items():
            parameter.grad = gradient
        optimizer.step()

    return step


def naive_step(network: LocalNetwork, batch: Batch) -> Callable[[], None]:
    """The same by repeated forwards."""
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        for parameter, gradient in naive_gradients(network, batch)[1].items():
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()

    return step


def forward_step(network: LocalNetwork, images: torch.Tensor) -> Callable[[], None]:
    """The segments once, without gradients."""

    def step() -> None:
        x = images
        with torch.no_grad(), network.autocast(images):
            for segment in network.segments:
                x = segment(x)

    return step


def flops(step: Callable[[], None]) -> int:
    """Of a step, a multiply-add counting as two."""
    with Flops() as counted:
        step()
    return counted.total


def peak_activations(network: nn.Module, batch: Batch) -> int:
    """Most bytes that autograd holds at once during a step."""
    with LiveActivations([*network.parameters(), *network.buffers(), batch.images]) as live:
        network(batch).loss.backward()
    network.zero_grad()
    return live.peak


def measure(steps: list[Callable[[], None]], rounds: int, warm_up: int = 2) -> list[list[float]]:
    """Seconds of every step in every round; the steps take turns, on a GPU ``STEPS`` of each at a time."""
    gpu = torch.cuda.is_available()
    repeats = STEPS if gpu else 1
    times: list[list[float]] = [[] for _ in steps]
    for round_ in range(warm_up + rounds):
        for i, step in enumerate(steps):
            start = time.perf_counter()
            for _ in range(repeats):
                step()
            if gpu:
                torch.cuda.synchronize()
            if round_ >= warm_up:
                times[i].append((time.perf_counter() - start) / repeats)
    return times


def head_times(network: LocalNetwork, batch: Batch, rounds: int) -> list[dict[str, Any]]:
    """What each head takes in a step: forward, and the gradients of its weights and input."""
    costs: list[dict[str, Any]] = []
    x = batch.images
    for number, segment in enumerate(network.segments):
        with torch.no_grad(), network.autocast(x):
            x = segment(x)
        for unit in network.plan.units:
            if unit.last == number and all(unit.head is not cost["head"] for cost in costs):
                wanted = [
                    x.detach().requires_grad_(),
                    *(p for p in unit.head.parameters() if p.requires_grad),
                ]

                def run(
                    unit: LocalUnit = unit, segment: Segment = segment, wanted: list[torch.Tensor] = wanted
                ) -> None:
                    with network.autocast(wanted[0]):
                        loss = unit.head(unit.head.seen(segment, wanted[0]), batch)
                    torch.autograd.grad(loss, wanted)

                seconds = statistics.median(measure([run], rounds)[0])
                parameters = sum(p.numel() for p in wanted[1:])
                costs.append(
                    {"unit": unit.name, "head": unit.head, "seconds": seconds, "parameters": parameters}
                )
    return [{key: value for key, value in cost.items() if key != "head"} for cost in costs]
