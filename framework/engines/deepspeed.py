"""DeepSpeed with ZeRO-0, 1 or 2. (``import deepspeed`` below is the library: imports are absolute.)

DeepSpeed divides optimizer and gradients among the ranks; what travels between them is started by this package while a
step runs (``late_zero.py``, which says why; ZeRO-0 divides nothing and is ``late.py``). Keys of DeepSpeed's own in the
recipe's section ``deepspeed`` may be about its steps, so with any of them DeepSpeed makes the steps itself: all of a
step's gradients are handed to it at the end.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.pipe.topology import PipelineParallelGrid
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from framework.data.batch import Batch
from framework.engines import partition, state
from framework.engines.base import (
    Engine,
    EngineSettings,
    OptimizerFactory,
    OptimizerState,
    Outputs,
    Rate,
    SavedOptimizer,
    Share,
    StepResult,
    marked,
    set_learning_rate,
    whole_share,
)
from framework.engines.deepspeed_config import AskedKeys, merged_config
from framework.engines.late import LateUpdates, Ranks
from framework.engines.late_zero import LateZero, Partitions, PartitionWire
from framework.engines.plain import Steps
from framework.execution import LocalNetwork
from framework.optim import SkippableOptimizer
from framework.runtime.distributed import device, world_size
from framework.runtime.errors import UserError


def build(net: LocalNetwork, make_optimizer: OptimizerFactory, settings: EngineSettings) -> Engine:
    """``net`` under DeepSpeed.

    Raises:
        UserError: the ``deepspeed:`` section contradicts the recipe, or DeepSpeed refuses it.
    """
    return DeepSpeedEngine(net, make_optimizer, settings)


class DeepSpeedEngine:
    """See ``Engine``. DeepSpeed runs in float32: autocast and loss scales belong to the network.

    Args:
        net: the network.
        make_optimizer: called here.
        settings: of the steps.
        wire: between the ranks under ZeRO-1 and 2; ``Partitions()`` if ``None``.
    """

    loads, lag = True, 1

    def __init__(
        self,
        net: LocalNetwork,
        make_optimizer: OptimizerFactory,
        settings: EngineSettings,
        wire: PartitionWire | None = None,
    ) -> None:
        config = merged_config(settings, sum(p.numel() for p in net.parameters()), world_size())
        join_ranks()
        checked_config(config)
        self.net, self.optimizer = net, make_optimizer(net)
        optimizer = self.optimizer

        def initialize() -> Any:
            self._engine, wrapped, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
            return wrapped

        self._zero: DeepSpeedZeroOptimizer | None = None
        self._steps: Steps
        clip, stage = settings.clip, settings.zero_stage
        if settings.deepspeed:
            wrapped = initialize()
            self._zero = wrapped if stage else None
            self._steps = DeepSpeedSteps(self._engine, optimizer)
        elif stage:
            late = LateZero(net, optimizer, initialize, clip, wire or Partitions(), world_size(), stage)
            self._steps, self._zero = late, late.zero
        else:
            initialize()
            self._steps = LateUpdates(net, optimizer, clip, Ranks(), world_size())
        self._groups = partition.partitioned_groups(self._zero, net) if self._zero else []
        for group, partitioned in zip(self.optimizer.param_groups, self._groups, strict=False):
            group["shard"] = partitioned.shard()

    def step(self, micro_batches: list[Batch], lr: Rate) -> StepResult:
        return self._steps.step(micro_batches, lr)

    def finish(self) -> None:
        self._steps.finish()

    def whole_net(self) -> LocalNetwork:
        self.finish()
        return self.net

    def model_shapes(self) -> dict[str, torch.Size]:
        return state.shapes_of(self.net)

    def model_state(self, prefix: str = "") -> dict[str, Tensor]:
        self.finish()
        return state.read_model(self.net, prefix)

    def share(self) -> Share:
        return whole_share(self)

    def load_model_state(self, full: Mapping[str, Tensor]) -> None:
        self.finish()
        state.write_model(self.net, full)
        if self._zero:
            self._zero.refresh_fp32_params()

    def optimizer_state(self) -> OptimizerState:
        self.finish()
        if self._zero:
            return partition.read_optimizer(self._zero, self._groups)
        return state.read_optimizer(self.optimizer, self.net)

    def load_optimizer_state(self, full: SavedOptimizer) -> None:
        self.finish()
        if self._zero:
            partition.write_optimizer(self._zero, self._groups, full)
        else:
            state.write_optimizer(self.optimizer, self.net, full)

    def close(self) -> None:
        self._steps.close()
        self._engine.destroy()


class DeepSpeedSteps:
    """``Steps`` as DeepSpeed makes them.

    Args:
        engine: DeepSpeed's.
        optimizer: the one that it was given.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, optimizer: SkippableOptimizer) -> None:
        self._engine, self._optimizer = engine, optimizer

    def step(self, micro_batches: list[Batch], lr: Rate) -> StepResult:
        outputs = Outputs()
        for batch in marked(micro_batches):
            output = self._engine(batch)
            self._engine.backward(output.loss)  # divides by the number of micro-batches
            outputs.add(output)
            if not batch.last:
                self._engine.step()  # only counts
        result = outputs.result()
        self._optimizer.skip = result.overflow
        set_learning_rate(self._optimizer, lr())
        self._engine.step()
        check_applied(self._engine, result.overflow)
        return result

    def finish(self) -> None:
        """Nothing is left over."""

    def close(self) -> None:
        """Nothing is held."""


def check_applied(engine: deepspeed.DeepSpeedEngine, overflow: Tensor | None) -> None:
    """Refuse steps that DeepSpeed leaves out by itself: ZeRO reads the norm by which it clips.

    Raises:
        UserError: it is not finite, and the step is none that is to be skipped.
    """
    if not engine.was_step_applied() and (overflow is None or not overflow):
        raise UserError("the norm of the gradient is not finite: lower optim.lr, or check the data")


def join_ranks() -> None:
    """Have DeepSpeed use the process group that exists."""
    deepspeed.utils.logger.addFilter(_not_about_untested_optimizers)
    # DeepSpeed's own calls.
    warnings.filterwarnings("ignore", ".*torch.distributed.* is deprecated", FutureWarning)
    if device().type == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce, which needs a compiler; and a build that is killed
        # leaves a lock file for which every later run waits for ever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)


def checked_config(
    config: dict[str, Any], grid: PipelineParallelGrid | None = None
) -> deepspeed.DeepSpeedConfig:
    """DeepSpeed's own view of its configuration, for ranks that may form a pipeline's grid.

    Raises:
        UserError: DeepSpeed refuses it, or passes by a key.
    """
    keys = AskedKeys(config)
    try:
        checked = deepspeed.DeepSpeedConfig(keys, grid)
    except Exception as error:  # of a section where it expects none it asks for attributes
        raise UserError(f"deepspeed: refused by DeepSpeed: {' '.join(str(error).split())}") from error
    keys.check()
    return checked


def _not_about_untested_optimizers(record: logging.LogRecord) -> bool:
    """This package's optimizers are tested under ZeRO; DeepSpeed can't know."""
    return "untested optimizer" not in record.getMessage()
