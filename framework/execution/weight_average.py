"""The moving average of a network's weights, which is scored and exported in their place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from framework.local.copies import follow

PREFIX = "average."  # of its names in a network's state


class WeightAverage(nn.Module):
    """average <- d average + (1 - d) weights after every optimizer step; the first one sets it to the weights.

    As timm's ``ModelEmaV3`` in timm's training, floating-point buffers (BatchNorm's statistics) are averaged, too, and
    others copied. All are buffers, named like what they follow, so checkpoints have them, whole, under every engine.

    Args:
        net: whose weights it begins with.
        parts: the modules in it that are averaged, by name.
        decay: d.

    Attributes:
        updates: those that were made.
    """

    def __init__(self, net: nn.Module, parts: Iterable[str], decay: float) -> None:
        super().__init__()
        self._rate = 1.0 - decay
        entries, prefixes = net.state_dict(), tuple(f"{part}." for part in parts)
        self._names = [name for name in entries if name.startswith(prefixes)]
        for name in self._names:
            place, _, own = name.rpartition(".")
            _module(self, place).register_buffer(own, entries[name].clone())
        self._followed = self._names
        self.updates: Tensor
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def follow_only(self, names: Iterable[str]) -> None:
        """Follow what this process trains of the network, by name in its state; ``update`` leaves the rest alone."""
        trained = set(names)
        self._followed = [name for name in self._names if name in trained]

    def pairs(self, net: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """The averages, each with what it follows."""
        return [(self.get_buffer(name), live) for name, live in _entries(net, self._names)]

    @torch.no_grad()
    def update(self, net: nn.Module, taken: Tensor | float = 1.0) -> None:
        """The optimizer has just stepped; ``taken`` is 0 where it skipped the step. Nothing is sent or read."""
        pairs = [(self.get_buffer(name), live) for name, live in _entries(net, self._followed)]
        first = (self.updates == 0).double()
        rate = taken * first.clamp(min=self._rate)
        follow([pair for pair in pairs if pair[0].is_floating_point()], rate)
        if others := [pair for pair in pairs if not pair[0].is_floating_point()]:
            averages, live = map(list, zip(*others, strict=True))
            torch._foreach_copy_(averages, live)
        self.updates += rate > 0

    @torch.no_grad()
    def exchange(self, net: nn.Module) -> None:
        """Weights and averages change places; a second call puts both back, to the last bit."""
        once = {live: name for name, live in _entries(net, self._names)}  # what a state has under two names
        for live, name in once.items():
            average = self.get_buffer(name)
            before = live.clone()
            live.copy_(average)
            average.copy_(before)


def evaluated_backbone(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone in a network's state that is scored and exported, averaged if it has averages; timm's names."""
    prefix = evaluated_prefix(state)
    return {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}


def evaluated_prefix(names: Iterable[str]) -> str:
    """How the names of those tensors begin."""
    averages = f"{PREFIX}backbone."
    return averages if any(name.startswith(averages) for name in names) else "backbone."


def _module(root: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path, made where there is none."""
    for name in path.split("."):
        if name not in dict(root.named_children()):
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    return root


def _entries(net: nn.Module, names: Iterable[str]) -> list[tuple[str, Tensor]]:
    """Tensors of a network's state, themselves."""
    entries = net.state_dict(keep_vars=True)
    return [(name, entries[name]) for name in names]
