"""Direct feedback alignment (Nøkland 2016): a fixed random matrix carries the error of the logits to every segment.

Windows: ``[i..i]`` for every segment i, in which ordinary backpropagation takes the error down. Head: a classifier on
the last segment; the others learn from B_i e with e = softmax(logits) - labels. All segments run forward before the
first learns, so nothing is freed earlier than in backpropagation. With ResNet-20 on CIFAR-10, and feedback to every
layer, Sanfiz and Akrout (2021) have an error of 39.35, backpropagation 9.42 (``recipes/cifar10/dfa_r20_cifar10.yaml``).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from framework.config.method_options import Execution
from framework.config.schema import Fault
from framework.local import Classifier, LocalUnit, MethodOptions, NetworkInfo, Plan


@dataclass
class Options(MethodOptions):
    """Pooling and a linear layer on top.

    Attributes:
        head: the classifier on the last segment.
    """

    head: Classifier = field(default_factory=Classifier)

    def check(self) -> None:
        """There is an error of the logits."""
        if self.head.task != "cross_entropy":
            raise Fault(
                "method.head.task",
                self.head.task,
                "dfa leads the error of the logits down: must be cross_entropy",
            )

    @property
    def execution(self) -> Execution:
        """From the last segment to the first."""
        return Execution("top first")


def plan(network: NetworkInfo, options: Options) -> Plan:
    """One unit a segment."""
    from framework.local.direct_feedback import DirectFeedback, ErrorHead

    last = len(network) - 1
    top = ErrorHead(options.head.build(network, last))
    heads = [DirectFeedback(network.shapes[i], network.num_classes, i, top) for i in range(last)]
    units = [LocalUnit(network.names[i], i, i, head) for i, head in enumerate([*heads, top])]
    return Plan(tuple(units), len(network), execution=options.execution)
