"""LoCo (Xiong et al. 2020): overlapping units of two stages, a contrastive loss on each (Figure 1).

Windows: ``[i..i+1]`` for every i but the last; ``Options`` has the variants of Table 5. Heads: a residual block,
pooling, an MLP, InfoNCE of two views.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from framework.config.schema import NonNegative, Positive
from framework.local import LocalUnit, MethodOptions, NetworkInfo, Plan, Projection, sliding_windows
from framework.local.units import Window, weigh
from framework.runtime.errors import UserError


@dataclass
class Options(MethodOptions):
    """The published LoCo, and the rows of its Table 5 (section 5.5).

    Attributes:
        window: segments in a unit; neighboring units share all but one.
        share_blocks: share only the first 1 or 2 blocks of the next stage, on a network that is cut at its blocks: a
            unit is a stage and these blocks, and the last stage is a unit of its own (our reading). ``None`` shares
            whole segments.
        shared_grad: whether shared weights learn from all their units, or only from the uppermost or the lowest;
            gradients pass through them in any case (the paper doesn't say).
        soft_share: coefficient of the L2 penalty between two copies of every shared segment; with 0 there is one copy,
            which the units share.
        soft_share_norm: whether the penalty includes BatchNorm's weights; the paper doesn't say.
        loco_losses: ``figure1``: the units of Figure 1. ``with_first_stage``: one more, on the first segment.
            ``monitor_first_stage``: the same, but it trains its own head only. Figure 1 has no loss there; the
            appendix plots one of res2.
        unit_loss_weights: weights of the units in order; none means all 1. The paper gives none.
        unit_loss_reduce: the weighted losses add up, or are averaged.
        head: one strided residual block, pooling and a 2-layer MLP (section 5.4, Table 4 row 11).
    """

    window: int = 2
    share_blocks: int | None = None
    shared_grad: Literal["both", "upper", "lower"] = "both"
    soft_share: NonNegative = 0.0
    soft_share_norm: bool = True
    loco_losses: Literal["figure1", "with_first_stage", "monitor_first_stage"] = "figure1"
    unit_loss_weights: tuple[Positive, ...] = ()
    unit_loss_reduce: Literal["sum", "mean"] = "sum"
    head: Projection = field(default_factory=lambda: Projection(conv_blocks=1))


def plan(network: NetworkInfo, options: Options) -> Plan:
    """``[i..i+window-1]`` for every i, so three units on ResNet-50: res2-3, res3-4, res4-5.

    Raises:
        UserError: the window is longer than the network, or the options ask for segments that are not there.
    """
    if options.soft_share > 0:
        return _softly_shared(network, options)
    if options.share_blocks is None:
        windows = sliding_windows(len(network), options.window)
    else:
        windows = _partly_shared(network, options.share_blocks)
    if options.loco_losses == "with_first_stage":
        windows.insert(0, (0, 0))
    learners = _learners(windows, options.shared_grad)
    units = []
    for u, (first, last) in enumerate(windows):
        trains = frozenset(s for s in range(first, last + 1) if u in learners[s])
        whole = len(trains) == last - first + 1
        head = options.head.build(network, last)
        name = (
            network.names[last]
            if options.share_blocks is None
            else f"{network.names[first]}-{network.names[last]}"
        )
        units.append(LocalUnit(name, first, last, head, trains=None if whole else trains))
    if options.loco_losses == "monitor_first_stage":
        head = options.head.build(network, 0)
        units.insert(0, LocalUnit(f"{network.names[0]}/monitor", 0, 0, head, trains=frozenset()))
    return _plan(units, network, options)


def _plan(units: list[LocalUnit], network: NetworkInfo, options: Options) -> Plan:
    weighed = weigh(units, options.unit_loss_weights, options.unit_loss_reduce)
    return Plan(weighed, len(network), views=2, teacher=options.head.teacher)


def _partly_shared(network: NetworkInfo, shared: int) -> list[Window]:
    blocks = network.blocks
    if [b.segment for b in blocks] != list(range(len(network))) or shared < 1:
        raise UserError(
            f"method.share_blocks={shared}: must be at least 1, on a network with network.cut=block"
        )
    stages = [[b.segment for b in blocks if b.stage == stage] for stage in range(1, blocks[-1].stage + 1)]
    following = [stage[:shared] for stage in stages[1:]] + [[]]
    return [(own[0], (own + more)[-1]) for own, more in zip(stages, following, strict=True)]


def _learners(windows: list[Window], shared_grad: str) -> dict[int, set[int]]:
    """Segment -> units that it learns from."""
    learners: dict[int, set[int]] = {}
    for u, (first, last) in enumerate(windows):
        for s in range(first, last + 1):
            learners.setdefault(s, set()).add(u)
    if shared_grad == "both":
        return learners
    pick = max if shared_grad == "upper" else min
    return {s: {pick(units)} for s, units in learners.items()}


def _softly_shared(network: NetworkInfo, options: Options) -> Plan:
    """``[i..i]`` under a copy of segment i+1, and the last two segments, which the trained network runs as they are."""
    from framework.local.soft_sharing import SoftSharedHead

    n = len(network)
    changed = (options.window, options.share_blocks, options.shared_grad, options.loco_losses)
    if n < 2 or changed != (2, None, "both", "figure1"):
        raise UserError(
            f"method.soft_share={options.soft_share}: copies whole segments in windows of 2; leave window, "
            "share_blocks, shared_grad and loco_losses as they are"
        )
    units = []
    for i in range(n - 2):
        inner = options.head.build(network, i + 1)
        head = SoftSharedHead(network, i + 1, inner, options.soft_share, options.soft_share_norm)
        units.append(LocalUnit(network.names[i + 1], i, i, head))
    units.append(LocalUnit(network.names[-1], n - 2, n - 1, options.head.build(network, n - 1)))
    return _plan(units, network, options)
