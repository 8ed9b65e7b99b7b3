"""Engines average gradients over ranks and step the optimizer.

``engine=NAME`` in a recipe is the file ``NAME.py`` here, which defines ``build(net, make_optimizer, settings)``
and returns an ``Engine`` (see ``base.py``; ``ddp.py`` is the shortest). A new engine is a new file here, and its name
in ``EngineName`` of ``config/recipe.py``. Pipeline stages are an engine too, ``pipeline/engine.py``: it stands above
this package because it builds on DeepSpeed's files here. Which of them a run gets, ``training/engine_choice.py``
says.
"""

from __future__ import annotations

import importlib
from typing import get_args

from framework.config.recipe import EngineName
from framework.engines.base import Engine, EngineSettings, OptimizerFactory, StepResult, prepare
from framework.execution import LocalNetwork
from framework.runtime.errors import UserError

__all__ = ["Engine", "EngineSettings", "StepResult", "build"]


def build(name: str, net: LocalNetwork, make_optimizer: OptimizerFactory, settings: EngineSettings) -> Engine:
    """Prepare ``net`` as ``prepare`` says and hand it to the engine of this name.

    Args:
        name: ``"deepspeed"``, ``"ddp"`` or ``"fsdp"``.
        net: ``net(batch) -> StepOutput``, float32 (under ddp and fsdp also float64).
        make_optimizer: such as ``partial(build_optimizer, name="lars")``; called once parameters are where they stay.
        settings: of its steps.

    Raises:
        UserError: another name; settings that the engine refuses; a batch size that can't be divided.
    """
    if name not in (names := get_args(EngineName)):
        raise UserError(f"engine={name}: must be one of {', '.join(names)}")
    prepare(net, settings)
    engine: Engine = importlib.import_module(f"{__name__}.{name}").build(net, make_optimizer, settings)
    return engine
