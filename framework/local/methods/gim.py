"""Greedy InfoMax in the SimCLR framework, the local baseline of LoCo (LoCo, section 3.2).

Windows: ``[i..i]`` for every segment i. Heads: pooling, an MLP, InfoNCE of two views.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from framework.config.schema import Positive
from framework.local import LocalUnit, MethodOptions, NetworkInfo, Plan, Projection
from framework.local.units import weigh


@dataclass
class Options(MethodOptions):
    """GIM as LoCo compares with it.

    Attributes:
        unit_loss_weights: weights of the units in order; none means all 1. LoCo gives none.
        unit_loss_reduce: the weighted losses add up, or are averaged.
        head: pooling and a 2-layer MLP, without a convolution block (LoCo Table 4, row 2).
    """

    unit_loss_weights: tuple[Positive, ...] = ()
    unit_loss_reduce: Literal["sum", "mean"] = "sum"
    head: Projection = field(default_factory=Projection)


def plan(network: NetworkInfo, options: Options) -> Plan:
    """One unit a segment."""
    units = [LocalUnit(name, i, i, options.head.build(network, i)) for i, name in enumerate(network.names)]
    weighed = weigh(units, options.unit_loss_weights, options.unit_loss_reduce)
    return Plan(weighed, len(network), views=2, teacher=options.head.teacher)
