"""Fully sharded data parallelism, segment by segment: weights, gradients and optimizer in slices between their uses.

PyTorch's FSDP2 is not used: its hooks release a module's weights when its ``forward`` or ``backward`` has ended, and a
local network computes gradients inside the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed import init_device_mesh
from torch.distributed.tensor import DTensor

from framework.data.batch import Batch
from framework.engines.base import (
    Engine,
    EngineSettings,
    OptimizerFactory,
    OptimizerState,
    Rate,
    SavedOptimizer,
    Share,
    StepResult,
)
from framework.engines.sharded import ShardedUpdates
from framework.engines.slices import Home, ShardRanks, Slices
from framework.engines.state import COUNTERS, on_host
from framework.execution import LocalNetwork
from framework.network.sharded_init import put
from framework.runtime.distributed import device, is_main, world_size
from framework.runtime.errors import UserError


def build(net: LocalNetwork, make_optimizer: OptimizerFactory, settings: EngineSettings) -> Engine:
    """``net``, sharded in place.

    Raises:
        UserError: a head looks at whole weights between steps; a part is sharded already.
    """
    for name, parameter in net.named_parameters():
        if isinstance(parameter, DTensor):
            raise UserError(
                f"engine=fsdp: {name} is sharded by fully_shard already; the engine does all of the sharding"
            )
    return ShardedEngine(net, make_optimizer, settings)


class ShardedEngine:
    """See ``Engine``."""

    loads, lag = True, 1

    def __init__(self, net: LocalNetwork, make_optimizer: OptimizerFactory, settings: EngineSettings) -> None:
        self.net, self.optimizer = net, make_optimizer(net)
        options = settings.sharding
        if world_size() % options.replicas:
            raise UserError(f"sharding.replicas={options.replicas}: must divide the {world_size()} ranks")
        mesh = init_device_mesh(device().type, (options.replicas, world_size() // options.replicas))
        ranks = self._ranks = ShardRanks(mesh)
        kinds = {"fp32": None, "bf16": torch.bfloat16}
        place = torch.device("cpu") if options.offload else device()
        home = Home(net.made, place, kinds[options.gather], kinds[options.reduce])
        often = options.reduce_every == "micro_batch"
        self._steps = ShardedUpdates(net, self.optimizer, settings.clip, ranks, home, often)
        self._slices = [group.slices for group in self._steps.groups]
        if net.average is not None:
            pairs = net.average.pairs(net)
            sliced = {tensor: slices for slices in self._slices for tensor in slices.tensors}
            averages = [average for average, live in pairs if live in sliced]
            if averages:
                self._slices.append(Slices(averages, ranks, home))
        self._make_the_rest()
        self._of = {tensor: slices for slices in self._slices for tensor in slices.tensors}

    def _make_the_rest(self) -> None:
        """What no step uses stays whole, and what was needed to make it goes."""
        made, self.net.made = self.net.made, None
        if made is None:
            return
        for tensor in (*self.net.parameters(), *self.net.buffers()):
            if tensor.is_meta:
                put(tensor, made.whole(tensor).to(device()))

    def step(self, micro_batches: list[Batch], lr: Rate) -> StepResult:
        return self._steps.step(micro_batches, lr)

    def finish(self) -> None:
        self._steps.finish()

    def whole_net(self) -> LocalNetwork:
        self._steps.finish()
        return self.net

    def model_shapes(self) -> dict[str, torch.Size]:
        entries = self.net.state_dict(keep_vars=True)
        return {
            name: self._of[tensor].shape(tensor) if tensor in self._of else tensor.shape
            for name, tensor in entries.items()
        }

    def model_state(self, prefix: str = "") -> dict[str, Tensor]:
        self._steps.finish()
        state = {}
        for name, tensor in self.net.state_dict(keep_vars=True).items():
            if name.startswith(prefix):
                slices = self._of.get(tensor)
                whole = slices.whole(tensor) if slices is not None else tensor.detach()
                if is_main():
                    state[name] = on_host(whole)
        return state

    def share(self) -> Share:
        self._steps.finish()
        number, count = self._ranks.number, self._ranks.size
        if not self._ranks.first:
            return Share(None, count, {}, {})
        model: dict[str, Tensor] = {}
        optimizer: OptimizerState = {}
        entries = self.net.state_dict(keep_vars=True)
        for name, tensor in entries.items():
            if (slices := self._of.get(tensor)) is not None:
                model[name] = on_host(slices.part(tensor))
            elif number == 0:
                model[name] = on_host(tensor)
        for name, key, value, parameter, slices in self._optimizer_entries():
            if slices is not None or number == 0:
                part = value if slices is None else slices.part(parameter, value)
                optimizer.setdefault(name, {})[key] = on_host(part)
        cut = entries.items() if count > 1 else ()
        shapes = {name: self._of[tensor].shape(tensor) for name, tensor in cut if tensor in self._of}
        return Share(number, count, model, optimizer, shapes)

    @torch.no_grad()
    def load_model_state(self, full: Mapping[str, Tensor]) -> None:
        self._steps.finish()
        for name, tensor in self.net.state_dict(keep_vars=True).items():
            if tensor in self._of:
                self._of[tensor].write(tensor, full[name])
            else:
                tensor.copy_(full[name])

    def optimizer_state(self) -> OptimizerState:
        self._steps.finish()
        found: OptimizerState = {}
        for name, key, value, parameter, slices in self._optimizer_entries():
            whole = slices.whole(parameter, value) if slices is not None else value
            if is_main():
                found.setdefault(name, {})[key] = on_host(whole)
        return found

    def _optimizer_entries(self) -> Iterator[tuple[str, str, Tensor, nn.Parameter, Slices | None]]:
        """Each parameter's name, a key of its state, the tensor, and the parameter.

        What is cut is a vector laid out like the slices that come with it, and has this rank's.
        """
        names = {parameter: name for name, parameter in self.net.named_parameters()}
        for group in self._steps.groups:
            states = [self.optimizer.state.get(flat, {}) for flat in group.flats.values()]
            for key in (key for key in states[0] if torch.is_tensor(states[0][key])) if states else ():
                values = [state[key] for state in states]
                vector = None if key in COUNTERS else torch.cat(values)
                for parameter in group.trained:
                    if vector is None:
                        yield names[parameter], key, values[group.kind_of(parameter)], parameter, None
                    else:
                        yield names[parameter], key, vector, parameter, group.slices

    def load_optimizer_state(self, full: SavedOptimizer) -> None:
        self._steps.finish()
        names = {parameter: name for name, parameter in self.net.named_parameters()}
        self.optimizer.state.clear()
        for group in self._steps.groups:
            known = [p for p in group.trained if names[p] in full]
            for key, example in full[names[known[0]]].items() if known else ():
                if key in COUNTERS:
                    for flat in group.flats.values():
                        self.optimizer.state[flat][key] = example.clone()
                    continue
                vector = torch.zeros_like(group.slices.flat)
                for parameter in known:
                    group.slices.write(parameter, full[names[parameter]][key], vector)
                parts = group.parts(vector)
                for flat, part in zip(group.flats.values(), parts, strict=True):
                    self.optimizer.state[flat][key] = part.clone()

    def close(self) -> None:
        self._steps.close()
        self._ranks.close()
