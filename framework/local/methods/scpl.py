"""Supervised contrastive parallel learning, SCPL (arXiv 2602.00062, 2026; code: github.com/minyaho/scpl).

Windows: ``[i..i]`` for every segment i. Heads: supervised contrast (SupCon) of an MLP's output on every segment but the
last, cross entropy of a linear classifier on the last. The code trains ResNet-18 and VGG for CIFAR in four segments,
200 epochs of Adam, batch 1024; in SupCon it divides by the number of positives and the anchor together, here by that of
the positives (Khosla et al. 2020).
"""

from __future__ import annotations

from dataclasses import dataclass

from framework.config.schema import Positive, PositiveInt
from framework.local import Classifier, LocalUnit, MethodOptions, NetworkInfo, Plan


@dataclass
class Options(MethodOptions):
    """The defaults of the authors' code.

    Attributes:
        proj_hidden: width of the projector's hidden layer, which sees the whole map.
        dim: of the embeddings.
        temperature: tau.
    """

    proj_hidden: PositiveInt = 512
    dim: PositiveInt = 1024
    temperature: Positive = 0.1


def plan(network: NetworkInfo, options: Options) -> Plan:
    """One unit a segment."""
    from torch import nn

    from framework.local.head import TrunkHead
    from framework.local.objectives import SupCon
    from framework.local.trunks import mlp

    last = len(network) - 1
    units = []
    for i, name in enumerate(network.names[:last]):
        channels, height, width = network.shapes[i]
        layers = mlp((channels * height * width, options.proj_hidden, options.dim), "none")
        head = TrunkHead(nn.Sequential(nn.Flatten(), *layers), SupCon(options.temperature))
        units.append(LocalUnit(name, i, i, head))
    units.append(LocalUnit(network.names[last], last, last, Classifier().build(network, last)))
    return Plan(tuple(units), len(network))
