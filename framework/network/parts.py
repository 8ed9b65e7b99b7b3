"""A part of a network as a module of its own, for heads that copy it."""

from __future__ import annotations

from torch import Tensor, nn

from framework.network.glue import Calls
from framework.network.structure import Steps


def part(network: nn.Module, steps: Steps) -> nn.Module:
    """What the steps run, as a module with these modules and parameters in it, as they are now."""
    if steps.training != steps.evaluation or any(isinstance(step, Calls) for step in steps.training):
        return Part(network, steps)
    first, *others = (network.get_submodule(step) for step in steps.training if isinstance(step, str))
    return nn.Sequential(first, *others) if others else first


class Part(nn.Module):
    """Modules and parameters of a network, under its names, and steps that run on them.

    Args:
        network: that has them.
        steps: what to run.
    """

    def __init__(self, network: nn.Module, steps: Steps) -> None:
        super().__init__()
        self.steps = steps
        for step in (step for mode in steps for step in mode):
            for path in step.paths if isinstance(step, Calls) else (step,):
                holder, last = self._holder(path)
                holder.add_module(last, network.get_submodule(path))
            for name in step.own if isinstance(step, Calls) else ():
                path, _, last = name.rpartition(".")
                holder, last = self._holder(name)
                tensor: Tensor = getattr(network.get_submodule(path), last)
                if isinstance(tensor, nn.Parameter):
                    holder.register_parameter(last, tensor)
                else:  # moves to devices with the part, and is in no checkpoint, as what is made anew
                    holder.register_buffer(last, tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """In the layout of the network."""
        for step in self.steps.training if self.training else self.steps.evaluation:
            x = step(self, x) if isinstance(step, Calls) else self.get_submodule(step)(x)
        return x

    def _holder(self, name: str) -> tuple[nn.Module, str]:
        holder: nn.Module = self
        *above, last = name.split(".")
        for part_of_name in above:
            if part_of_name not in dict(holder.named_children()):
                holder.add_module(part_of_name, nn.Module())
            holder = holder.get_submodule(part_of_name)
        return holder, last
