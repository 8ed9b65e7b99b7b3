"""MAN (Su et al. 2024): between a segment and its head, the sum of two copies of the next block.

One copy is trained, the other is the block's moving average; so it is MLAAN's LAM with a list of one block.
Windows: ``[i..i]`` for every segment i. Heads: a classifier (and InfoPro's decoder) behind the copies; the last
segment has pooling and a linear layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from framework.config.schema import Fraction
from framework.local import Classifier, LocalUnit, MethodOptions, NetworkInfo, Plan
from framework.local.lam import LamBuilder
from framework.local.lam_copies import Copies
from framework.local.reconstruction import Reconstruction
from framework.runtime.errors import UserError

if TYPE_CHECKING:
    from framework.local.head import Head


@dataclass
class Options(MethodOptions):
    """DGL with MAN; InfoPro with MAN is ``{head: {kind: 1c2f}, reconstruction: {lambdas: auglocal}}``.

    Attributes:
        head: the auxiliary classifier.
        reconstruction: InfoPro's decoder beside it, or ``None``.
        ema_m: momentum of the moving average.
    """

    head: Classifier = field(default_factory=lambda: Classifier("mlp_sr_auglocal"))
    reconstruction: Reconstruction | None = None
    ema_m: Fraction = 0.995


def plan(network: NetworkInfo, options: Options) -> Plan:
    """One unit a segment.

    Raises:
        UserError: the next block can't be copied, or a module's lambdas are both 0.
    """
    last = len(network) - 1
    lams = LamBuilder(network, {}, Copies(momentum=options.ema_m))
    units = []
    for i, name in enumerate(network.names[:last]):
        lam, shape = lams.next_block(i)
        classifier = options.head.build(network, i, shape)
        head: Head | None = classifier
        if options.reconstruction is not None:
            head = options.reconstruction.beside(classifier, network, i, shape)
        if head is None:
            raise UserError(f"method.reconstruction: both lambdas are 0 at segment {name}")
        units.append(LocalUnit(name, i, i, lam.under(head)))
    units.append(LocalUnit(network.names[last], last, last, Classifier().build(network, last)))
    return Plan(tuple(units), len(network))
