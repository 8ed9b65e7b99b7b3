"""Fully sharded data parallelism, segment by segment: weights, gradients and optimizer in slices between their uses.

PyTorch's FSDP2 is not used: its hooks release a module's weights when its ``forward`` or ``backward`` has ended, and a
local network computes gradients inside the forward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import init_device_mesh
from torch.distributed.tensor import DTensor

from framework.data.batch import Batch
from framework.engines.base import (
    Engine,
    EngineSettings,
    OptimizerFactory,
    OptimizerState,
    Rate,
    StepResult,
)
from framework.engines.sharded import ShardedUpdates
from framework.engines.slices import Home, ShardRanks, Slices
from framework.engines.state import COUNTERS
from framework.execution import LocalNetwork
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
        ranks = ShardRanks(mesh)
        kinds = {"fp32": None, "bf16": torch.bfloat16}
        place = torch.device("cpu") if options.offload else device()
        home = Home(place, kinds[options.gather], kinds[options.reduce])
        often = options.reduce_every == "micro_batch"
        self._steps = ShardedUpdates(net, self.optimizer, settings.clip, ranks, home, often)
        self._slices = [group.slices for group in self._steps.groups]
        if net.average is not None:
            pairs = net.average.pairs(net)
            sliced = {tensor: slices for slices in self._slices for tensor in slices.tensors}
            averages = [average for average, live in pairs if live in sliced]
            if averages:
                self._slices.append(Slices(averages, ranks, place))
        self._of = {tensor: slices for slices in self._slices for tensor in slices.tensors}

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

    def model_state(self) -> dict[str, Tensor]:
        self._steps.finish()
        state = {}
        for name, tensor in self.net.state_dict(keep_vars=True).items():
            slices = self._of.get(tensor)
            whole = slices.whole(tensor) if slices is not None else tensor.detach()
            if is_main():
                state[name] = torch.empty(whole.shape, dtype=whole.dtype).copy_(whole)
        return state

    @torch.no_grad()
    def load_model_state(self, full: dict[str, Tensor]) -> None:
        self._steps.finish()
        for name, tensor in self.net.state_dict(keep_vars=True).items():
            if tensor in self._of:
                self._of[tensor].write(tensor, full[name])
            else:
                tensor.copy_(full[name])

    def optimizer_state(self) -> OptimizerState:
        self._steps.finish()
        names = {parameter: name for name, parameter in self.net.named_parameters()}
        found: OptimizerState = {}
        for group in self._steps.groups:
            states = [self.optimizer.state.get(flat, {}) for flat in group.flats.values()]
            for key in (key for key in states[0] if torch.is_tensor(states[0][key])) if states else ():
                values = [state[key] for state in states]
                for parameter in group.trained:
                    if key in COUNTERS:
                        whole = values[group.kind_of(parameter)]
                    else:
                        whole = group.slices.whole(parameter, torch.cat(values))
                    if is_main():
                        copy = torch.empty(whole.shape, dtype=whole.dtype).copy_(whole)
                        found.setdefault(names[parameter], {})[key] = copy
        return found

    def load_optimizer_state(self, full: OptimizerState) -> None:
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
