"""Decoupled Greedy Learning (Belilovsky et al. 2020): every segment under its own classifier."""

from __future__ import annotations

from dataclasses import dataclass, field

from framework.local.heads import Classifier
from framework.local.units import Asynchronous, LocalUnit, Plan, Task


@dataclass
class Options(Asynchronous):
    """``head``: the auxiliary classifier; the last segment has pooling and a linear layer, as in later papers' code."""

    head: Classifier = field(default_factory=lambda: Classifier("mlp_sr_auglocal"))


def plan(task: Task, options: Options) -> Plan:
    """``[i..i]`` for every segment i."""
    last = len(task) - 1
    units = []
    for i in range(len(task)):
        head = Classifier() if i == last else options.head
        units.append(LocalUnit(task.names[i], i, i, head.build(task.shapes[i], task.num_classes)))
    return Plan(tuple(units), len(task), supervised=True, asynchronous=options)
