"""Weights that are gathered together, and what the optimizer steps in their place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from framework.engines.slice_gradients import SliceGradients
from framework.engines.slices import Home, ShardRanks, Slices
from framework.execution.uses import STAYS, Use, Uses
from framework.optim import SkippableOptimizer
from framework.optim.lars import Piece, Shard


class ShardGroup:
    """Weights that are used together.

    Args:
        weights: parameters, trained or not, and averages.
        kinds: by trained parameter, the number of its optimizer group.
        ranks: that share them.
        home: how they are kept.
        gathered: type in which they are gathered and used; ``None`` for their own.

    Attributes:
        slices: of all of them.
        flats: by number of the optimizer group, this rank's slices of its parameters: what is optimized.
        releases: whether, after its first, second ... use in a micro-batch, the group is released.
        used: uses in this micro-batch.
    """

    def __init__(
        self,
        weights: list[Tensor],
        kinds: Mapping[Tensor, int],
        ranks: ShardRanks,
        home: Home,
        gathered: torch.dtype | None = None,
    ) -> None:
        trained = (t for t in weights if isinstance(t, nn.Parameter) and t in kinds)
        self.trained = sorted(trained, key=lambda p: kinds[p])
        others = (t for t in weights if t not in kinds)
        self.slices = Slices([*self.trained, *others], ranks, home, gathered)
        self.gradients = SliceGradients(self.slices, self.trained, ranks, home.reduced)
        widths = Counter[int]()
        for parameter in self.trained:
            widths[kinds[parameter]] += self.slices.widths[parameter]
        self._widths = list(widths.values())
        parts = self.parts(self.slices.flat)
        self.flats = {kind: nn.Parameter(part) for kind, part in zip(widths, parts, strict=True)}
        self._kinds = kinds
        self.releases: list[bool] = []
        self.used = 0

    def parts(self, vector: Tensor) -> list[Tensor]:
        """What belongs to each of ``flats`` in a vector laid out like the slices."""
        return list(vector[: sum(self._widths)].split(self._widths)) if self._widths else []

    def kind_of(self, parameter: Tensor) -> int:
        """Which of ``flats`` has a parameter, counted from 0."""
        return list(self.flats).index(self._kinds[parameter])

    def give(self, gradients: Tensor) -> None:
        """Hand slices of all gradients to the optimizer's parameters."""
        for flat, part in zip(self.flats.values(), self.parts(gradients), strict=True):
            flat.grad = part


def shard_groups(
    uses: Uses,
    optimizer: SkippableOptimizer,
    names: Mapping[nn.Parameter, str],
    ranks: ShardRanks,
    home: Home,
) -> dict[Use, list[ShardGroup]]:
    """Cut everything that is used into slices, and have the optimizer step these; the groups of each use.

    Weights with the same uses are a group, so a segment is one, and the heads on it are another.
    """
    kinds = {p: number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
    users: dict[Tensor, list[Use]] = {}
    for use, weights in uses.weights.items():
        for weight in dict.fromkeys(weights):
            users.setdefault(weight, []).append(use)
    together: dict[tuple[tuple[Use, ...], torch.dtype, torch.dtype | None], list[Tensor]] = {}
    for weight, own in users.items():
        gathered = home.gathered if weight.ndim > 1 else None
        together.setdefault((tuple(own), weight.dtype, gathered), []).append(weight)
    found: dict[Use, list[ShardGroup]] = {use: [] for use in uses.weights}
    groups = []
    for (_, _, gathered), weights in together.items():
        groups.append(ShardGroup(weights, kinds, ranks, home, gathered))
        for use in users[weights[0]]:
            found[use].append(groups[-1])
    for group in groups:
        moments = [turn for turn, done in enumerate(uses.turns) for use in done if group in found[use]]
        group.releases = [later - turn > STAYS for turn, later in pairwise(moments)] + [True]
    optimizer.param_groups = [
        {**optimizer.param_groups[kind], "params": [flat], "shard": _shard(group, kind, kinds, names, ranks)}
        for group in groups
        for kind, flat in group.flats.items()
    ]
    return found


def _shard(
    group: ShardGroup,
    kind: int,
    kinds: Mapping[Tensor, int],
    names: Mapping[nn.Parameter, str],
    ranks: ShardRanks,
) -> Shard:
    own = [parameter for parameter in group.trained if kinds[parameter] == kind]
    widths = [group.slices.widths[parameter] for parameter in own]
    begin = group.slices.places[own[0]]
    pieces = (
        Piece(number, ranks.number * width, group.slices.places[p] - begin, width)
        for number, (p, width) in enumerate(zip(own, widths, strict=True))
    )
    names_of = tuple(names[parameter] for parameter in own)
    return Shard(names_of, tuple(pieces), ranks.group, ranks.copies, group.slices.place)
