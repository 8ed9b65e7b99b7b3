"""Small networks and batches that several tests share."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from framework.batch import Batch
from framework.execution import LocalNetwork
from framework.local.heads import Classifier
from framework.local.methods import dgl, loco, mlaan
from framework.model import local_network

CLASSES = 10

#: label -> method, options, cut: every method, with its own heads, on windows of several lengths
CASES: dict[str, tuple[str, Any, str]] = {
    "bp": ("bp", None, "block"),
    "simclr": ("simclr", None, "stage"),
    "gim": ("gim", None, "stage"),
    "loco": ("loco", None, "stage"),
    "loco-3": ("loco", loco.Options(window=3), "block"),
    "dgl": ("dgl", None, "block"),
    "dgl-1c2f": ("dgl", dgl.Options(Classifier("1c2f")), "block"),
    "dgl-mlp-sr": ("dgl", dgl.Options(Classifier("mlp_sr")), "stage"),
    "mlm-1": ("mlaan", mlaan.Options(window=1), "block"),
    "mlm-2": ("mlaan", None, "block"),
    "mlm-3": ("mlaan", mlaan.Options(window=3), "block"),
    "mlm-6": ("mlaan", mlaan.Options(window=6), "block"),
}

#: cases whose losses are recorded: one a method, and MLAAN's other window
GOLDEN = ("bp", "simclr", "gim", "loco", "dgl", "mlm-2", "mlm-3")


def network(
    case: str, name: str = "resnet14", image_size: int = 16, seed: int = 0, **arguments: Any
) -> LocalNetwork:
    """The network of a case in training mode."""
    method, options, cut = CASES[case]
    torch.manual_seed(seed)
    return local_network(
        name, method, options, image_size=image_size, num_classes=CLASSES, cut=cut, **arguments
    ).train()


def batch(net: LocalNetwork, size: int = 8, image_size: int = 16, seed: int = 0) -> Batch:
    """Random images (float64) as the plan of ``net`` wants them: two views, or labels."""
    generator = np.random.default_rng(seed)
    images = torch.from_numpy(generator.standard_normal((size * net.plan.views, 3, image_size, image_size)))
    labels = torch.from_numpy(generator.integers(CLASSES, size=size))
    return Batch(images, labels if net.plan.supervised else None, net.plan.views)


def gradients(net: LocalNetwork) -> dict[str, Tensor]:
    """Copies of all gradients by parameter name."""
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def relative_error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


def routed(net: LocalNetwork, data: Batch) -> dict[str, Tensor]:
    """Gradients of one routed step on a copy of ``net``."""
    net = copy.deepcopy(net)
    net(data).loss.backward()
    return gradients(net)
