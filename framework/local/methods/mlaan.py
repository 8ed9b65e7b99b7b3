"""MLAAN (Zhang et al. 2024): multilaminar local modules, supervised (Eqs. 1, 2, 9, 11, 12; FACTS D)."""

from __future__ import annotations

from dataclasses import dataclass, field

from framework.errors import UserError
from framework.local.heads import Classifier
from framework.local.units import LocalUnit, Plan, Task


@dataclass
class Options:
    """Multilaminar windows as the authors run them.

    Attributes:
        window: k, modules in a cascaded window (2 for the row "MLAAN", 3 for the starred rows; FACTS M2).
        w_indep: weight of the loss on a single module (FACTS M4).
        w_casc: weight of the loss on a cascaded window.
        indep_head: head of a single module (FACTS M13).
        casc_head: head of a window.
    """

    window: int = 2
    w_indep: float = 0.001
    w_casc: float = 0.999
    indep_head: Classifier = field(default_factory=Classifier)
    casc_head: Classifier = field(default_factory=Classifier)


def plan(task: Task, options: Options) -> Plan:
    """``[i..i]`` and ``[i-k+1..i]``, both for i >= k-1 only (FACTS M3); the last module has one shared head.

    Raises:
        UserError: the window is longer than the network.
    """
    n, k = len(task), options.window
    if not 1 <= k <= n:
        raise UserError(f"method.window={k}: the network has {n} segments, so 1 to {n} are possible")
    units = []
    for i in range(k - 1, n):
        name, shape = task.names[i], task.shapes[i]
        if i < n - 1:
            single = options.indep_head.build(shape, task.num_classes)
            window = options.casc_head.build(shape, task.num_classes)
        else:
            single = window = Classifier().build(shape, task.num_classes)
        units.append(LocalUnit(f"{name}/single", i, i, single, options.w_indep))
        units.append(LocalUnit(f"{name}/window", i - k + 1, i, window, options.w_casc))
    return Plan(tuple(units), n, supervised=True)
