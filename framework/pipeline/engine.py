"""Pipeline stages on DeepSpeed, as one engine of the training loop."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups
from torch import Tensor

from framework.config.recipe import Pipeline
from framework.data.batch import Batch
from framework.engines import partition, state
from framework.engines.base import (
    EngineSettings,
    OptimizerFactory,
    OptimizerState,
    Rate,
    SavedOptimizer,
    Share,
    StepResult,
    marked,
    prepare,
    whole_share,
)
from framework.engines.deepspeed import check_applied, checked_config, join_ranks
from framework.engines.deepspeed_config import merged_config
from framework.execution import LocalNetwork
from framework.network.norm import synchronize_among
from framework.pipeline.rank.deepspeed_pipeline import BoundaryEngine
from framework.pipeline.rank.stage import Stage, owners
from framework.pipeline.rank.stage_worker import StageWorker
from framework.pipeline.scheduling.placement import Placement
from framework.pipeline.scheduling.schedule import Layout, drain_instructions, step_instructions
from framework.pipeline.scheduling.simulation import AHEAD, Event
from framework.pipeline.scheduling.weight_readers import WeightReaders
from framework.runtime.distributed import device, gather_tensors, rank, world_size


class PipelinedEngine:
    """See ``Engine``. Every rank trains one stage.

    ``net`` is whole on every rank; its weights of other stages are out of date until ``whole_net`` is called.

    Args:
        net: the network, the same on all ranks.
        make_optimizer: called with this rank's stage.
        settings: of its steps; a ``clip`` above 0 makes every step wait for all stages, ``zero_stage`` is 0 or 1.
        placement: segments of the stages.
        options: how stages work together.

    Attributes:
        lag: see ``Engine``.
        loads: see ``Engine``.
        events: of this rank; set to a list to record them.

    Raises:
        UserError: the ``deepspeed:`` section contradicts the recipe, or DeepSpeed refuses it.
    """

    def __init__(
        self,
        net: LocalNetwork,
        make_optimizer: OptimizerFactory,
        settings: EngineSettings,
        placement: Placement,
        options: Pipeline,
    ) -> None:
        prepare(net, settings, placement.stages)
        self.net, self.placement = net, placement
        self._readers = WeightReaders(net, placement)
        reads = self._readers.reads
        contrast = options.contrast == "batch"
        programs, micro_batches = net.program.segment_programs, settings.micro_batches
        self.layout = Layout(programs, placement, micro_batches, reads, contrast, options.lam_lag)
        join_ranks()
        self._stage = Stage(net, placement, world_size() // placement.stages)
        grid = self._stage.mpu()
        synchronize_among(net.modules(), grid.get_data_parallel_group())
        parameters = sum(p.numel() for p in self._stage.parameters())
        config = merged_config(settings, parameters, grid.get_data_parallel_world_size())
        self.optimizer = make_optimizer(self._stage)
        self._engine = BoundaryEngine(
            args=None,
            model=self._stage,
            optimizer=self.optimizer,
            mpu=grid,
            config=config,
            config_class=checked_config(config, grid),
        )
        self._worker = self._engine.worker = StageWorker(
            net, self.layout, self._readers, grid, options.timeout
        )
        wrapped = self._engine.optimizer
        self._zero = wrapped if isinstance(wrapped, DeepSpeedZeroOptimizer) else None
        self._groups = partition.partitioned_groups(self._zero, net) if self._zero else []
        for group, partitioned in zip(self.optimizer.param_groups, self._groups, strict=False):
            group["shard"] = partitioned.shard()
        self._owners = owners(net, placement)
        if net.average is not None:
            net.average.follow_only(n for n, stage in self._owners.items() if stage == self._worker.stage)
        self._parked = False
        self._steps = 0
        self.lag = 1 + -(-(placement.stages - 1) * (1 + AHEAD) // settings.micro_batches)
        self.loads = self._worker.stage == 0
        self.events: list[Event] | None = None
        self._park()

    def step(self, micro_batches: list[Batch], lr: Rate) -> StepResult:
        self._park()
        self._engine.learning_rate = lr
        self._worker.begin_step(list(marked(micro_batches)))
        self._engine.run(step_instructions(self.layout, self._worker.stage, self._steps), self.events)
        self._steps += 1
        worker = self._worker
        check_applied(self._engine, worker.overflow)
        losses = worker.unit_losses / (self.layout.micro_batches * self._engine.dp_world_size)
        return StepResult(losses, worker.overflow, worker.hopeless)

    def finish(self) -> None:
        """Nothing is left over."""

    def whole_net(self) -> LocalNetwork:
        self._drain()
        self.net.to(device())
        self._parked = False
        with torch.no_grad():
            for name, tensor in self.net.state_dict(keep_vars=True).items():
                whole = tensor.detach().contiguous()
                dist.broadcast(whole, src=self._lead(self._owners[name]))
                tensor.copy_(whole)
        return self.net

    def model_shapes(self) -> dict[str, torch.Size]:
        return state.shapes_of(self.net)

    def model_state(self, prefix: str = "") -> dict[str, Tensor]:
        self._drain()
        mine = {}
        if self._leads:
            entries = self.net.state_dict()
            own = (name for name, stage in self._owners.items() if stage == self._worker.stage)
            mine = {name: entries[name] for name in own if name.startswith(prefix)}
        gathered = gather_tensors(mine)
        return {name: gathered[name] for name in self._owners if name in gathered}

    def share(self) -> Share:
        return whole_share(self)

    def load_model_state(self, full: Mapping[str, Tensor]) -> None:
        self._drain()
        state.write_model(self.net, full)
        if self._zero:
            self._zero.refresh_fp32_params()

    def optimizer_state(self) -> OptimizerState:
        self._drain()
        if self._zero:
            own = partition.read_optimizer(self._zero, self._groups)
        else:
            own = state.own_optimizer(self.optimizer, self.net) if self._leads else {}
        flat = {f"{name}/{key}": value for name, values in own.items() for key, value in values.items()}
        full: OptimizerState = {}
        for key, value in gather_tensors(flat).items():
            name, _, kind = key.rpartition("/")
            full.setdefault(name, {})[kind] = value
        return full

    def load_optimizer_state(self, full: SavedOptimizer) -> None:
        own = {name: values for name, values in full.items() if self._owners[name] == self._worker.stage}
        if self._zero:
            partition.write_optimizer(self._zero, self._groups, own)
        else:
            state.write_optimizer(self.optimizer, self.net, own)

    def close(self) -> None:
        self._drain()
        self._engine.destroy()
        groups.mpu = None  # DeepSpeed keeps the grid in a global, where the next engine would find it
        for group in (*self._worker.groups, *self._stage.process_groups()):
            dist.destroy_process_group(group)  # each has threads

    @property
    def _leads(self) -> bool:
        """Whether this rank speaks for its stage."""
        return rank() == self._lead(self._worker.stage)

    def _lead(self, stage: int) -> int:
        return stage * self._engine.dp_world_size

    def _drain(self) -> None:
        """Receive all messages in flight between stages, so that no later step depends on one before."""
        self._engine.run(drain_instructions(self.layout, self._worker.stage, self._steps))
        self._worker.flush()
        self._steps = 0

    def _park(self) -> None:
        """Move weights of other stages to host memory, except those that heads here read."""
        if device().type == "cpu" or self._parked:
            return
        self._parked = True
        entries = self.net.state_dict(keep_vars=True)
        stages = range(self.placement.stages)
        read_here = {id(p) for owner in stages for p in self._readers.weights(self._worker.stage, owner)}
        for name, stage in self._owners.items():
            if stage != self._worker.stage and id(entries[name]) not in read_here:
                entries[name].data = entries[name].data.cpu()
