"""Greedy InfoMax in the SimCLR framework, the local baseline of LoCo (LoCo section 3.1; FACTS F)."""

from __future__ import annotations

from dataclasses import dataclass, field

from framework.local.heads import Projection
from framework.local.units import LocalUnit, Plan, Task


@dataclass
class Options:
    """``head``: pooling and a 2-layer MLP, without a convolution block (LoCo Table 4, row 2)."""

    head: Projection = field(default_factory=Projection)


def plan(task: Task, options: Options) -> Plan:
    """``[i..i]`` for every segment i."""
    units = (LocalUnit(task.names[i], i, i, options.head.build(task, i)) for i in range(len(task)))
    return Plan(tuple(units), len(task), views=2)
