"""Decoupled Greedy Learning (Belilovsky et al. 2020).

Windows: ``[i..i]`` for every segment i. Heads: an auxiliary classifier; the last segment has pooling and a linear
layer, as in the code of later papers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from framework.local import Asynchronous, Classifier, LocalUnit, NetworkInfo, Plan


@dataclass
class Options(Asynchronous):
    """DGL as later papers compare with it.

    Attributes:
        head: the auxiliary classifier.
    """

    head: Classifier = field(default_factory=lambda: Classifier("mlp_sr_auglocal"))


def plan(network: NetworkInfo, options: Options) -> Plan:
    """One unit a segment."""
    last = len(network) - 1
    units = []
    for i, name in enumerate(network.names):
        head = Classifier() if i == last else options.head
        units.append(LocalUnit(name, i, i, head.build(network, i)))
    return Plan(tuple(units), len(network), execution=options.execution)
