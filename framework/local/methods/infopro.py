"""InfoPro (Wang et al. 2021): every segment keeps what the image and the task need."""

from __future__ import annotations

from dataclasses import dataclass, field

from framework.local.heads import Classifier
from framework.local.reconstruction import Reconstruction
from framework.local.units import Asynchronous, LocalUnit, Plan, Task
from framework.runtime.errors import UserError


@dataclass
class Options(Asynchronous):
    """InfoPro with the cross entropy, as AugLocal's and MLAAN's code compare with it.

    InfoPro* is the same on segments balanced for memory, which is the network's cut: for ResNet-110 K=2, 3
    or 4, with ``{reconstruction: {lambdas: cifar10_balanced}}``.

    Attributes:
        head: the task term; ``{task: contrast}`` is the supervised contrast of InfoPro's own code.
        reconstruction: the decoder, and the weights of the two terms.
    """

    head: Classifier = field(default_factory=lambda: Classifier("1c2f"))
    reconstruction: Reconstruction = field(default_factory=Reconstruction)


def plan(task: Task, options: Options) -> Plan:
    """``[i..i]`` for every segment i; the last has pooling, a linear layer and cross entropy alone.

    Raises:
        UserError: both lambdas of a module are 0, so that nothing would train it.
    """
    last = len(task) - 1
    units = []
    for i in range(last):
        head = options.head.build(task.shapes[i], task.num_classes)
        local = options.reconstruction.beside(head, task, i, task.shapes[i])
        if local is None:
            raise UserError(f"method.reconstruction: both lambdas are 0 at segment {task.names[i]}")
        units.append(LocalUnit(task.names[i], i, i, local))
    head = Classifier().build(task.shapes[last], task.num_classes)
    units.append(LocalUnit(task.names[last], last, last, head))
    return Plan(tuple(units), len(task), supervised=True, asynchronous=options)
