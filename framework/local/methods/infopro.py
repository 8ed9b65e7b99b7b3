"""InfoPro (Wang et al. 2021): every segment keeps what is needed of the image and for the labels.

Windows: ``[i..i]`` for every segment i. Heads: a decoder that reconstructs the images beside a classifier; the last
segment has pooling, a linear layer and cross entropy alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from framework.local import Asynchronous, Classifier, LocalUnit, NetworkInfo, Plan
from framework.local.reconstruction import Reconstruction
from framework.runtime.errors import UserError


@dataclass
class Options(Asynchronous):
    """InfoPro with the cross entropy, as AugLocal's and MLAAN's code compare with it.

    InfoPro* is the same on segments balanced for memory, which is the network's cut: for ResNet-110 K=2, 3
    or 4, with ``{reconstruction: {lambdas: cifar10_balanced}}``.

    Attributes:
        head: the classifier; ``{task: contrast}`` is the supervised contrast of InfoPro's own code.
        reconstruction: the decoder, and the weights of the two terms.
    """

    head: Classifier = field(default_factory=lambda: Classifier("1c2f"))
    reconstruction: Reconstruction = field(default_factory=Reconstruction)


def plan(network: NetworkInfo, options: Options) -> Plan:
    """One unit a segment.

    Raises:
        UserError: both lambdas of a module are 0, so that nothing would train it.
    """
    last = len(network) - 1
    units = []
    for i, name in enumerate(network.names[:last]):
        head = options.reconstruction.beside(options.head.build(network, i), network, i)
        if head is None:
            raise UserError(f"method.reconstruction: both lambdas are 0 at segment {name}")
        units.append(LocalUnit(name, i, i, head))
    units.append(LocalUnit(network.names[last], last, last, Classifier().build(network, last)))
    return Plan(tuple(units), len(network), execution=options.execution)
