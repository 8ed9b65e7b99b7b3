"""End-to-end backpropagation.

Windows: ``[0..N-1]``. Head: pooling, a linear classifier, cross entropy.
"""

from __future__ import annotations

from dataclasses import dataclass

from framework.local import Classifier, LocalUnit, MethodOptions, NetworkInfo, Plan


@dataclass
class Options(MethodOptions):
    """End-to-end backpropagation has nothing to choose."""


def plan(network: NetworkInfo, options: Options) -> Plan:
    """One unit over the whole network."""
    last = len(network) - 1
    unit = LocalUnit(network.names[last], 0, last, Classifier().build(network, last))
    return Plan((unit,), len(network))
