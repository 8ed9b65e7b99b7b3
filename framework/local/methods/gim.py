"""Greedy InfoMax in the SimCLR framework, the local baseline of LoCo (LoCo, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from framework.config.schema import Positive
from framework.local.heads import Projection
from framework.local.units import LocalUnit, Plan, Task, weigh


@dataclass
class Options:
    """GIM as LoCo compares with it.

    Attributes:
        unit_loss_weights: of the units in order; none means all 1. LoCo gives none.
        unit_loss_reduce: the weighted losses add up, or are averaged.
        head: pooling and a 2-layer MLP, without a convolution block (LoCo Table 4, row 2).
    """

    unit_loss_weights: tuple[Positive, ...] = ()
    unit_loss_reduce: Literal["sum", "mean"] = "sum"
    head: Projection = field(default_factory=Projection)


def plan(task: Task, options: Options) -> Plan:
    """``[i..i]`` for every segment i."""
    units = [LocalUnit(task.names[i], i, i, options.head.build(task, i)) for i in range(len(task))]
    weighed = weigh(units, options.unit_loss_weights, options.unit_loss_reduce)
    return Plan(weighed, len(task), views=2)
