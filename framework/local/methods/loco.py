"""LoCo (Xiong et al. 2020): overlapping units of two stages, a contrastive loss on each (Figure 1)."""

from __future__ import annotations

from dataclasses import dataclass, field

from framework.errors import UserError
from framework.local.heads import Projection
from framework.local.units import LocalUnit, Plan, Task


@dataclass
class Options:
    """The published LoCo.

    Attributes:
        window: segments a unit spans; neighbouring units share all but one.
        head: one strided residual block, pooling and a 2-layer MLP (LoCo section 3.3, Table 4 row 11).
    """

    window: int = 2
    head: Projection = field(default_factory=lambda: Projection(conv_blocks=1))


def plan(task: Task, options: Options) -> Plan:
    """``[i..i+window-1]`` for every i, so three units on ResNet-50: res2-3, res3-4, res4-5.

    Raises:
        UserError: the window is longer than the network.
    """
    n, k = len(task), options.window
    if not 1 <= k <= n:
        raise UserError(f"method.window={k}: the network has {n} segments, so 1 to {n} are possible")
    ends = range(k - 1, n)
    units = (LocalUnit(task.names[j], j - k + 1, j, options.head.build(task.shapes[j])) for j in ends)
    return Plan(tuple(units), n, views=2)
