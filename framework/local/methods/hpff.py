"""HPFF (Su et al. 2024): MLAAN's two levels of windows without LAM, and a decoder that works in patches.

From the authors' code. Windows: ``[i..i]`` and ``[i-1..i]`` for i >= 1, with weights 0.001 and 0.999. Heads: a
classifier on single modules; on windows InfoPro's two terms, with a decoder for each quarter of the image. The last
two units share pooling and a linear layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from framework.config.schema import Positive
from framework.local import Classifier, LocalUnit, MethodOptions, NetworkInfo, Plan, sliding_windows
from framework.local.reconstruction import Reconstruction


@dataclass
class Options(MethodOptions):
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


def plan(network: NetworkInfo, options: Options) -> Plan:
    """``[i..i]`` and ``[i-k+1..i]`` for i >= k-1.

    Raises:
        UserError: the window is longer than the network.
    """
    units = []
    for first, last in sliding_windows(len(network), options.window):
        name = network.names[last]
        if last < len(network) - 1:
            single = options.head.build(network, last)
            window = options.reconstruction.beside(options.head.build(network, last), network, last)
        else:
            single = window = Classifier().build(network, last)
        units.append(LocalUnit(f"{name}/single", last, last, single, options.w_indep))
        if window is not None:
            units.append(LocalUnit(f"{name}/window", first, last, window, options.w_casc))
    return Plan(tuple(units), len(network))
