"""Feedback alignment (Lillicrap et al. 2016): fixed random weights carry errors down, end to end or in local windows.

Windows: ``[0..N-1]``, or sliding ones. Head: a linear classifier. Weights learn as usual from the errors that reach
them. LoCo's authors promised their reviewers the comparison and have not published it. With ResNet-20 on CIFAR-10
Sanfiz and Akrout (2021) have an error of 36.38, backpropagation 9.42 (``recipes/cifar10/fa_r20_cifar10.yaml``).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from framework.config.schema import PositiveInt
from framework.local import Classifier, LocalUnit, MethodOptions, NetworkInfo, Plan, sliding_windows


@dataclass
class Options(MethodOptions):
    """End to end with pooling and a linear layer.

    Attributes:
        window: segments in a local window, one ending at each segment from ``window - 1`` on; ``None`` is the network.
        head: the classifier, whose errors take the same way down.
    """

    window: PositiveInt | None = None
    head: Classifier = field(default_factory=Classifier)


def plan(network: NetworkInfo, options: Options) -> Plan:
    """One unit over the whole network, or one a window.

    Raises:
        UserError: a window that is longer than the network.
    """
    return Plan(units(network, options), len(network), feedback="random")


def units(network: NetworkInfo, options: Options) -> tuple[LocalUnit, ...]:
    """A classifier on each window."""
    windows = sliding_windows(len(network), options.window or len(network))
    return tuple(
        LocalUnit(network.names[last], first, last, options.head.build(network, last))
        for first, last in windows
    )
