"""The dictionary that DeepSpeed gets: the recipe's numbers, and whatever the ``deepspeed:`` section adds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from framework.engines.base import EngineSettings
from framework.runtime.errors import UserError

# DeepSpeed key -> the recipe key that decides it.
DECIDED = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size and train.accumulation",
    "gradient_accumulation_steps": "train.accumulation",
    "managed_gradient_accumulation": "train.accumulation",
    "gradient_clipping": "optim.clip",
    "gradient_allreduce_op": "optim.lr",
    "optimizer": "optim",
    "scheduler": "optim.warmup_epochs and train.epochs",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "bfloat16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "zero_optimization.stage": "zero_stage",
}

# DeepSpeed key -> why it is refused.
REFUSED = {
    "pipeline": "its stages are the recipe's section pipeline",
    "tensor_parallel": "convolutions are not split over ranks",
    "sequence_parallel_size": "images have no sequence to split",
    "expert_parallel": "there are no experts",
    "hybrid_engine": "it is for generating text",
    "data_efficiency": "the order of samples is the data loader's",
    "curriculum_learning": "the order of samples is the data loader's",
    "zero_optimization.offload_param": "it needs ZeRO-3, which frees weights that local gradients still need",
    "zero_optimization.cpu_offload_param": "it needs ZeRO-3, which frees weights that local gradients still need",
    "zero_optimization.offload_optimizer": "DeepSpeed offloads its own optimizers only",
    "zero_optimization.cpu_offload": "DeepSpeed offloads its own optimizers only",
    "zero_optimization.zenflow": "DeepSpeed offloads its own optimizers only",
}


def merged_config(settings: EngineSettings, parameters: int, replicas: int) -> dict[str, Any]:
    """DeepSpeed's configuration.

    Args:
        settings: of the engine's steps.
        parameters: number of trained scalars.
        replicas: ranks among which a batch is split: all, unless they form pipelines.

    Raises:
        UserError: the ``deepspeed:`` section contradicts the recipe or asks for what can't be had; another ZeRO stage.
    """
    section, zero_stage = settings.deepspeed, settings.zero_stage
    _check(section, zero_stage)
    zero: dict[str, Any] = {
        "stage": zero_stage,
        # DeepSpeed reserves this many elements at every backward pass, 2 GB if left alone.
        "reduce_bucket_size": min(parameters, 500_000_000),
    }
    if zero_stage:
        zero["compute_grad_norm"] = settings.clip > 0
    return {
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU at every micro-batch
        **section,
        "zero_allow_untested_optimizer": True,  # it knows none of this package's
        "train_batch_size": settings.batch_size,
        "train_micro_batch_size_per_gpu": settings.batch_size // (settings.micro_batches * replicas),
        "gradient_accumulation_steps": settings.micro_batches,
        "gradient_clipping": settings.clip,  # DeepSpeed clips at 1.0 if left alone
        "zero_optimization": {**zero, **section.get("zero_optimization", {})},
    }


def _check(section: Mapping[str, Any], zero_stage: int) -> None:
    if zero_stage not in (0, 1, 2):
        raise UserError(
            f"zero_stage={zero_stage}: must be 0, 1 or 2; ZeRO-3 gathers a weight for each forward and again for the "
            "backward, and local gradients need it in between: engine=fsdp shards weights, too"
        )
    zero = section.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise UserError(f"deepspeed.zero_optimization={zero}: must be a section of DeepSpeed's keys")
    for key in ("steps_per_print", "gradient_predivide_factor"):  # DeepSpeed divides by them without a check
        number = section.get(key)
        if number is not None and (
            not isinstance(number, int | float) or isinstance(number, bool) or number <= 0
        ):
            raise UserError(f"deepspeed.{key}={number}: must be a number above 0")
    for key in [*section, *(f"zero_optimization.{key}" for key in zero)]:
        if key in DECIDED:
            raise UserError(f"deepspeed.{key}: the recipe decides this; set {DECIDED[key]}")
        if key in REFUSED:
            raise UserError(f"deepspeed.{key}: {REFUSED[key]}")


class AskedKeys(dict[str, Any]):
    """A section, and those inside it, that note which keys DeepSpeed asks for: it ignores those that it doesn't know.

    Attributes:
        asked: the keys.
    """

    def __init__(self, section: Mapping[str, Any]) -> None:
        inner = {k: AskedKeys(v) if isinstance(v, Mapping) else v for k, v in section.items()}
        super().__init__(inner)
        self.asked: set[object] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(key)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:
        self.asked.update(
            super().keys()
        )  # handed on as a whole, to a model that refuses what it doesn't know
        return super().__iter__()

    def keys(self) -> Any:
        return self

    def __copy__(self) -> AskedKeys:
        return self  # DeepSpeed asks a copy

    def check(self, name: str = "deepspeed") -> None:
        """Call it when DeepSpeed has read its configuration.

        Raises:
            UserError: a key that it did not ask for, unless it passes by a whole section that is not enabled.
        """
        if self.get("enabled") is False:
            return
        known = [key for key in self.asked if isinstance(key, str)]
        for key, value in self.items():
            if key not in known:
                near = get_close_matches(key, known, n=1)
                raise UserError(
                    f"{name}.{key}: DeepSpeed knows no such key{f'; did you mean {near[0]}?' if near else ''}"
                )
            if isinstance(value, AskedKeys) and value.asked:
                value.check(f"{name}.{key}")
