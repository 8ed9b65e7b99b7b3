"""What ``bench_step`` times: networks of every method from the same weights, and their steps."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from framework.batch import Batch
from framework.execution.activations import LiveActivations
from framework.execution.graph import RecordedStep
from framework.execution.naive import naive_gradients
from framework.execution.routing import LocalNetwork
from framework.local.heads import Classifier, Projection
from framework.local.methods import auglocal, bp, dgl, gim, hpff, infopro, loco, man, mlaan, simclr
from framework.model import local_network
from framework.network import Cut

CLASSES = 10
CONTRASTIVE = ("simclr", "gim", "loco")


def options(method: str, head: str, window: int) -> Any:
    """The method's options: its own head (``paper``), pooling and linear (``gap``), or a classifier's kind."""
    contrast: Any = {"head": Projection(layers=1)} if head == "gap" else {}
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
        "lam": lambda: mlaan.Options(window=1, w_indep=1.0, w_casc=0.0, lam_on="independent"),
        "mlaan": lambda: mlaan.Options(window=window),
    }[method]()


def build(method: str, arguments: argparse.Namespace, image_size: int, cut: Cut) -> LocalNetwork:
    """The network with the method's units, from the same random weights each time.

    With ``--modules`` the stem is a module of its own for DGL, InfoPro and AugLocal, as in the papers.
    """
    torch.manual_seed(0)
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


def peak_activations(network: nn.Module, batch: Batch) -> int:
    """Most bytes that autograd holds at once during a step."""
    with LiveActivations([*network.parameters(), *network.buffers(), batch.images]) as live:
        network(batch).loss.backward()
    network.zero_grad()
    return live.peak
