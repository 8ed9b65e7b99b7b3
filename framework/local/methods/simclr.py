"""SimCLR (Chen et al. 2020), end to end.

Windows: ``[0..N-1]``. Head: pooling, an MLP, InfoNCE of two views.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from framework.local import LocalUnit, MethodOptions, NetworkInfo, Plan, Projection


@dataclass
class Options(MethodOptions):
    """Head as in LoCo Table 4, row 1.

    Attributes:
        head: pooling and a 2-layer MLP to 128 dimensions.
    """

    head: Projection = field(default_factory=Projection)


def plan(network: NetworkInfo, options: Options) -> Plan:
    """One unit over the whole network."""
    last = len(network) - 1
    unit = LocalUnit(network.names[last], 0, last, options.head.build(network, last))
    return Plan((unit,), len(network), views=2, teacher=options.head.teacher)
