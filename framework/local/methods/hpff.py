"""HPFF (Su et al. 2024): MLAAN's two levels of windows without LAM, and a decoder that works in patches.

From the authors' code: windows ``[i..i]`` and ``[i-1..i]`` for i >= 1, weights 0.001 and 0.999; on the
windows InfoPro's two terms, with a decoder for each quarter of the image, on single modules a classifier.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from framework.config.schema import Positive
from framework.local.heads import Classifier
from framework.local.reconstruction import Reconstruction
from framework.local.units import LocalUnit, Plan, Task, sliding_windows


@dataclass
class Options:
    """InfoPro with HPFF, as the authors run it.

    Attributes:
        window: segments in a cascaded window.
        w_indep: weight of the loss on a single module.
        w_casc: weight of the loss on a window.
        head: classifier of either.
        reconstruction: the decoder in patches and the weights of InfoPro's terms.
    """

    window: int = 2
    w_indep: Positive = 0.001
    w_casc: Positive = 0.999
    head: Classifier = field(default_factory=lambda: Classifier("0c2f"))
    reconstruction: Reconstruction = field(default_factory=lambda: Reconstruction(patches=4))


def plan(task: Task, options: Options) -> Plan:
    """``[i..i]`` and ``[i-k+1..i]`` for i >= k-1; the last two share pooling and a linear layer.

    Raises:
        UserError: the window is longer than the network.
    """
    units = []
    for first, last in sliding_windows(len(task), options.window):
        name, shape = task.names[last], task.shapes[last]
        if last < len(task) - 1:
            single = options.head.build(shape, task.num_classes)
            classifier = options.head.build(shape, task.num_classes)
            window = options.reconstruction.beside(classifier, task, last, shape)
        else:
            single = window = Classifier().build(shape, task.num_classes)
        units.append(LocalUnit(f"{name}/single", last, last, single, options.w_indep))
        if window is not None:
            units.append(LocalUnit(f"{name}/window", first, last, window, options.w_casc))
    return Plan(tuple(units), len(task), supervised=True)
