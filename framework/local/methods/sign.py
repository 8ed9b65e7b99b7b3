"""Sign-symmetric feedback (Liao et al. 2016; Xiao et al. 2019): the signs of the weights carry errors down.

Windows and heads as in ``fa``; each layer's signs are scaled to the norm of its weights. With ResNet-20 on CIFAR-10
Sanfiz and Akrout (2021) have an error of 15.01, backpropagation 9.42 (``recipes/cifar10/sign_r20_cifar10.yaml``).
"""

from __future__ import annotations

from dataclasses import dataclass

from framework.local import NetworkInfo, Plan
from framework.local.methods import fa


@dataclass
class Options(fa.Options):
    """As in ``fa``."""


def plan(network: NetworkInfo, options: Options) -> Plan:
    """One unit over the whole network, or one a window.

    Raises:
        UserError: a window that is longer than the network.
    """
    return Plan(fa.units(network, options), len(network), feedback="sign")
