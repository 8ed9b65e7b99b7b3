"""The segments and heads that a rank trains, as the ``PipelineModule`` that DeepSpeed's engine takes."""

from __future__ import annotations

import contextlib
import os

import torch.distributed as dist
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from torch import nn

from framework.execution import LocalNetwork
from framework.execution.weight_average import PREFIX
from framework.local.units import LocalUnit
from framework.network import Segment
from framework.optim.groups import exempt_parameters, rate_scales
from framework.pipeline.scheduling.placement import Placement


class _Layer(nn.Module):
    """Registers the weights of a segment and of the heads on it."""

    def __init__(self, segment: Segment, units: list[LocalUnit]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(segment.modules())
        self.heads = nn.ModuleList(dict.fromkeys(unit.head for unit in units))
        for name in (*segment.own, *segment.follows):
            tensor = segment.tensor(name)
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                self.register_parameter(name.replace(".", "_"), tensor)


class Stage(PipelineModule):
    """The segments of this rank's stage; DeepSpeed sees one layer a segment.

    The layers share their modules with ``net``, which is whole on every rank. Its weights of other stages are out of
    date; they are updated where a head reads them, and all of them for evaluation.

    Args:
        net: the whole network.
        placement: segments of the stages.
        replicas: copies of the pipeline, each with a share of every micro-batch.
    """

    def __init__(self, net: LocalNetwork, placement: Placement, replicas: int) -> None:
        self.bounds = placement.bounds
        self._exempt = exempt_parameters(net)
        self._net = (net,)  # a tuple is not registered
        layers = [
            _Layer(segment, [unit for unit in net.plan.units if unit.last == s])
            for s, segment in enumerate(net.segments)
        ]
        topology = PipeDataParallelTopology(num_pp=placement.stages, num_dp=replicas)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # it prints its grid
            super().__init__(layers=layers, topology=topology)
        for parameter in self.parameters():
            parameter.model_parallel = (
                True  # DeepSpeed then counts it in the norm of the whole network's gradient
            )

    def no_weight_decay(self) -> set[str]:
        """Names, in this module, of parameters that the network exempts; its backbone is no part of this module."""
        return {name for name, parameter in self.named_parameters() if parameter in self._exempt}

    def rate_scales(self, layer_decay: float) -> dict[nn.Parameter, float]:
        """Those of the whole network's layers."""
        return rate_scales(self._net[0], layer_decay)

    def process_groups(self) -> list[dist.ProcessGroup]:
        """Process groups of this rank that DeepSpeed made for the grid."""
        grid = self._grid
        made = (self.world_group, grid.ds_model_proc_group, grid.dp_proc_group, grid.pp_proc_group)
        return [*made, grid.slice_proc_group]

    def _partition_layers(self, method: str = "") -> None:
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.bounds[stage], stop=self.bounds[stage + 1])


def owners(net: LocalNetwork, placement: Placement) -> dict[str, int]:
    """The stage of each entry of ``net.state_dict()``: an average's is that of what it follows.

    Entries of no segment and no head belong to the first stage.
    """
    stages: dict[int, int] = {}
    for s, segment in enumerate(net.segments):
        layer = _Layer(segment, [unit for unit in net.plan.units if unit.last == s])
        averages = net.teacher.tensors(s) if net.teacher is not None else []
        for tensor in [*layer.parameters(), *layer.buffers(), *averages]:
            stages[id(tensor)] = placement.stage_of(s)
    entries = net.state_dict(keep_vars=True)
    return {
        name: stages.get(id(entries.get(name.removeprefix(PREFIX), tensor)), 0)
        for name, tensor in entries.items()
    }
