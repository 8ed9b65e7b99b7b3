"""What engines refuse, in one line each."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch.distributed.fsdp import fully_shard

from framework.config.recipe import EngineName
from framework.engines.base import EngineSettings
from framework.engines.deepspeed import checked_config
from framework.engines.deepspeed_config import merged_config
from framework.runtime.errors import UserError
from tests.support import training
from tests.support.training import Case

PoolOf = Callable[[int], Any]


def zero(**options: Any) -> dict[str, Any]:
    return {"zero_optimization": options}


def wrap_twice() -> str:
    net = training.Dyadic()
    net.part = torch.nn.Linear(2, 2)
    fully_shard(net.part)
    with pytest.raises(UserError) as caught:
        training.build(Case(engine="fsdp"), net)
    return str(caught.value)


def test_fsdp_refuses_a_network_in_which_a_part_is_wrapped(pool: PoolOf) -> None:
    assert "engine=fsdp: part.weight is sharded by fully_shard already" in pool(1).run(wrap_twice)[0]


def refusal(case: Case) -> str:
    with pytest.raises(UserError) as caught:
        training.build(case)
    return str(caught.value)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case(engine="horovod"), "engine=horovod: must be one of deepspeed, ddp, fsdp"),
        (
            Case(accumulation=3),
            "train.batch_size=16: must be a multiple of 3 (train.accumulation=3 x 1 ranks)",
        ),
        (Case(zero_stage=3), "zero_stage=3: must be 0, 1 or 2"),
        (Case(deepspeed=zero(overlap_comm="perhaps")), "deepspeed: refused by DeepSpeed"),
        (Case(deepspeed=zero(overlap_com=True)), "deepspeed: refused by DeepSpeed"),
        (Case(deepspeed={"flops_profiler": 3}), "deepspeed: refused by DeepSpeed"),
        (
            Case(deepspeed={"stepps_per_print": 3}),
            "deepspeed.stepps_per_print: DeepSpeed knows no such key; did you mean steps_per_print?",
        ),
        (
            Case(deepspeed={"flops_profiler": {"profile_stp": 3}}),
            "deepspeed.flops_profiler.profile_stp: DeepSpeed knows no such key; did you mean profile_step?",
        ),
        (Case(deepspeed={"communication_data_type": 3}), "deepspeed: refused by DeepSpeed"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_settings_that_are_refused(pool: PoolOf, case: Case, message: str) -> None:
    text = pool(1).run(refusal, case)[0]
    assert message in text and "\n" not in text


SECTIONS: dict[str, Any] = {
    "activation_checkpointing": {"partition_activations": False, "profile": False},
    "aio": {"block_size": 4, "queue_depth": 8},
    "autotuning": {"enabled": False, "fast": True},
    "checkpoint": {"tag_validation": "Warn", "parallel_write": {"pipeline_stage": False}},
    "comms_logger": {"enabled": True, "prof_all": True},
    "communication_data_type": "fp32",
    "flops_profiler": {"enabled": True, "profile_step": 1, "output_file": None},
    "prescale_gradients": True,
    "tensorboard": {"enabled": False, "output_path": "tb", "job_name": "x"},
    "timers": {"throughput": {"enabled": True, "synchronized": False}},
    "wall_clock_breakdown": True,
    **zero(overlap_comm=True, round_robin_gradients=True, allgather_bucket_size=5),
}


def test_sections_that_deepspeed_knows_pass() -> None:
    settings = EngineSettings(8, zero_stage=1, deepspeed=SECTIONS)
    checked_config(merged_config(settings, parameters=10, replicas=1))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"optimizer": {"type": "Adam"}}, "deepspeed.optimizer: the recipe decides this; set optim"),
        ({"gradient_clipping": 1.0}, "deepspeed.gradient_clipping: the recipe decides this; set optim.clip"),
        ({"fp16": {"enabled": True}}, "deepspeed.fp16: the recipe decides this; set train.precision"),
        (
            {"train_batch_size": 8},
            "deepspeed.train_batch_size: the recipe decides this; set train.batch_size",
        ),
        (zero(stage=2), "deepspeed.zero_optimization.stage: the recipe decides this; set zero_stage"),
        (
            zero(offload_optimizer={"device": "cpu"}),
            "deepspeed.zero_optimization.offload_optimizer: DeepSpeed",
        ),
        ({"zero_optimization": True}, "deepspeed.zero_optimization=True: must be a section"),
        ({"steps_per_print": 0}, "deepspeed.steps_per_print=0: must be a number above 0"),
        (
            {"gradient_predivide_factor": "x"},
            "deepspeed.gradient_predivide_factor=x: must be a number above 0",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_sections_that_contradict_the_recipe(section: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        merged_config(EngineSettings(8, deepspeed=section), parameters=10, replicas=1)
    assert str(caught.value).startswith(message)


def test_clipping_is_always_written_and_the_section_adds_to_the_rest() -> None:
    section = {**zero(overlap_comm=True), "wall_clock_breakdown": True}
    settings = EngineSettings(8, micro_batches=2, zero_stage=2, deepspeed=section)
    config = merged_config(settings, parameters=10, replicas=1)
    assert config["gradient_clipping"] == 0.0
    assert config["zero_optimization"]["stage"] == 2 and config["zero_optimization"]["overlap_comm"] is True
    assert config["wall_clock_breakdown"] is True
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] == 8


@pytest.mark.parametrize("name", get_args(EngineName))
def test_every_name_in_a_recipe_is_a_file_of_engines(name: str) -> None:
    """A new engine is its file and its name in ``EngineName``, and nothing else."""
    module = importlib.import_module(f"framework.engines.{name}")
    assert list(inspect.signature(module.build).parameters) == ["net", "make_optimizer", "settings"]
