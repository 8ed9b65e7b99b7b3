"""End-to-end backpropagation: one window over the whole network, one classifier."""

from __future__ import annotations

from dataclasses import dataclass

from framework.local.heads import Classifier
from framework.local.units import LocalUnit, Plan, Task


@dataclass
class Options:
    """End-to-end backpropagation has nothing to choose."""


def plan(task: Task, options: Options) -> Plan:
    """``[0..N-1]`` with pooling, a linear classifier and cross entropy."""
    unit = LocalUnit(task.names[-1], 0, len(task) - 1, Classifier().build(task.shapes[-1], task.num_classes))
    return Plan((unit,), len(task), supervised=True)
