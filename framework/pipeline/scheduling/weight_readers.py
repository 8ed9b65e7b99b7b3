"""Heads that read the weights of segments (``Head.reads``), and on which stages both are."""

from __future__ import annotations

from collections import defaultdict

from torch import nn

from framework.execution import LocalNetwork
from framework.local.head import Head
from framework.pipeline.scheduling.placement import Placement
from framework.runtime.errors import UserError


class WeightReaders:
    """Which heads read weights, of which stages.

    Args:
        net: the network.
        placement: segments of the stages.

    Attributes:
        local: heads by stage that read weights of their own stage, or none.
        remote: heads by stage that read weights of later stages.

    Raises:
        UserError: a head stands on several stages, reads weights both of its own and of other stages, has a penalty
            on others' weights, or must read them earlier than they can arrive.
    """

    def __init__(self, net: LocalNetwork, placement: Placement) -> None:
        self.local: dict[int, list[Head]] = defaultdict(list)
        self.remote: dict[int, list[Head]] = defaultdict(list)
        self._weights: dict[tuple[int, int], dict[nn.Parameter, None]] = defaultdict(dict)
        owner = {p: placement.stage_of(s) for s, seg in enumerate(net.segments) for p in seg.parameters()}
        for head in net.plan.heads:
            units = [unit for unit in net.plan.units if unit.head is head]
            unit, stage = units[0], placement.stage_of(units[0].last)
            if any(placement.stage_of(other.last) != stage for other in units):
                raise UserError(
                    f"pipeline.stages={placement.stages}: the head of unit {unit.name} stands on segments of several "
                    "stages; put them on one stage with pipeline.balance=[...]"
                )
            weights = head.read_parameters(net.segments)
            others = {owner[p] for p in weights} - {stage}
            if not others:
                self.local[stage].append(head)
                continue
            if stage in {owner[p] for p in weights}:
                raise UserError(
                    f"pipeline.stages={placement.stages}: the head of unit {unit.name} reads weights of its own "
                    "stage and of others; put them on one stage with pipeline.balance=[...]"
                )
            if head.penalizes:
                raise UserError(
                    f"pipeline.stages={placement.stages}: the head of unit {unit.name} pulls at the weights of "
                    "another stage (soft sharing); put the two on one stage with pipeline.balance=[...]"
                )
            if not head.may_lag:
                raise UserError(
                    f"pipeline.stages={placement.stages}: the head of unit {unit.name} reads another stage in a way "
                    "that would stop the pipeline at every step (after it, or with BatchNorm's statistics); "
                    "put the two on one stage with pipeline.balance=[...]"
                )
            self.remote[stage].append(head)
            for parameter in weights:
                self._weights[stage, owner[parameter]][parameter] = None

    @property
    def reads(self) -> frozenset[tuple[int, int]]:
        """Pairs (stage of the head, stage of the weights)."""
        return frozenset(self._weights)

    def weights(self, reader: int, owner: int) -> list[nn.Parameter]:
        """Weights of stage ``owner`` that heads of stage ``reader`` read, in the same order on both."""
        return list(self._weights[reader, owner])
