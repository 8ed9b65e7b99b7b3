"""SimCLR (Chen et al. 2020): one window over the whole network, contrasted at the top."""

from __future__ import annotations

from dataclasses import dataclass, field

from framework.local.heads import Projection
from framework.local.units import LocalUnit, Plan, Task


@dataclass
class Options:
    """``head``: pooling and a 2-layer MLP to 128 dimensions (LoCo Table 4, row 1)."""

    head: Projection = field(default_factory=Projection)


def plan(task: Task, options: Options) -> Plan:
    """``[0..N-1]``."""
    unit = LocalUnit(task.names[-1], 0, len(task) - 1, options.head.build(task, len(task) - 1))
    return Plan((unit,), len(task), views=2)
