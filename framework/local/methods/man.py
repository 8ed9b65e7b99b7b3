"""MAN (Su et al. 2024): between a segment and its head, the sum of two copies of the next block.

One copy is trained, the other is the block's moving average; so it is MLAAN's LAM with a list of one block.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from framework.config.schema import Fraction
from framework.local.heads import Classifier
from framework.local.lam import Copies, LamBuilder, LamHead
from framework.local.reconstruction import Reconstruction
from framework.local.units import LocalUnit, Plan, Task
from framework.runtime.errors import UserError


@dataclass
class Options:
    """DGL with MAN; InfoPro with MAN is ``{head: {kind: 1c2f}, reconstruction: {lambdas: auglocal}}``.

    Attributes:
        head: the auxiliary classifier.
        reconstruction: InfoPro's decoder beside it, or ``None``.
        ema_m: momentum of the moving average.
    """

    head: Classifier = field(default_factory=lambda: Classifier("mlp_sr_auglocal"))
    reconstruction: Reconstruction | None = None
    ema_m: Fraction = 0.995


def plan(task: Task, options: Options) -> Plan:
    """``[i..i]`` for every segment i; the last has pooling and a linear layer.

    Raises:
        UserError: the next block's structure is not known, or a module's lambdas are both 0.
    """
    last = len(task) - 1
    lams = LamBuilder(task, {}, Copies(momentum=options.ema_m))
    units = []
    for i in range(last):
        lam, shape = lams.next_block(i)
        classifier = options.head.build(shape, task.num_classes)
        head: nn.Module | None = classifier
        if options.reconstruction is not None:
            head = options.reconstruction.beside(classifier, task, i, shape)
        if head is None:
            raise UserError(f"method.reconstruction: both lambdas are 0 at segment {task.names[i]}")
        units.append(LocalUnit(task.names[i], i, i, LamHead(lam, head)))
    top = Classifier().build(task.shapes[last], task.num_classes)
    units.append(LocalUnit(task.names[last], last, last, top))
    return Plan(tuple(units), len(task), supervised=True)
