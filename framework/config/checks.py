"""What no single key of a recipe can show."""

from __future__ import annotations

from dataclasses import fields

from framework.config.recipe import Recipe, Sharding
from framework.config.schema import Fault


def check(recipe: Recipe) -> None:
    """Check keys against each other.

    Raises:
        Fault: the first that does not go with another.
    """
    warmup, epochs = recipe.optim.warmup_epochs, recipe.train.epochs
    if warmup > epochs:
        raise Fault("optim.warmup_epochs", warmup, f"must be at most train.epochs={epochs}; set it, too")
    profile = recipe.logging.profile
    if profile is not None and profile[0] > profile[1]:
        raise Fault("logging.profile", list(profile), "the first step must not come after the last")
    recipe.method.options.check()
    _check_views(recipe)
    _check_pipeline(recipe)
    _check_sharding(recipe)
    _check_execution(recipe)


def _check_views(recipe: Recipe) -> None:
    policy, kind = recipe.views.rand_augment, recipe.views.kind
    if policy is None:
        return
    if kind not in ("supervised", "cifar"):
        raise Fault("views.rand_augment", policy, f"is for views.kind=supervised or cifar, not {kind}")
    if recipe.data.cache == "memory":
        raise Fault("views.rand_augment", policy, "works on images as they are decoded: set data.cache=none")


def _check_pipeline(recipe: Recipe) -> None:
    pipeline, train = recipe.pipeline, recipe.train
    if pipeline.micro_batches is not None and train.accumulation not in (1, pipeline.micro_batches):
        raise Fault(
            "pipeline.micro_batches",
            pipeline.micro_batches,
            f"train.accumulation={train.accumulation} says otherwise",
        )
    if recipe.micro_batches > 1 and train.batch_size % recipe.micro_batches:
        key = "train.accumulation" if pipeline.micro_batches is None else "pipeline.micro_batches"
        raise Fault(key, recipe.micro_batches, f"must divide train.batch_size={train.batch_size}")
    if recipe.pipelined and recipe.engine != "deepspeed":
        raise Fault("engine", recipe.engine, "pipeline stages need engine=deepspeed")
    if recipe.pipelined and recipe.zero_stage > 1:
        raise Fault("zero_stage", recipe.zero_stage, "must be 0 or 1 with pipeline stages")
    if recipe.pipelined and recipe.faults.nonfinite == "skip":
        raise Fault(
            "faults.nonfinite", "skip", "must be stop with pipeline stages, which do not wait for each other"
        )


def _check_sharding(recipe: Recipe) -> None:
    if recipe.zero_stage == 3:
        raise Fault(
            "zero_stage",
            3,
            "must be 0, 1 or 2; ZeRO-3 gathers a weight for each forward and again for the backward, and local "
            "gradients need it in between: engine=fsdp shards weights, too",
        )
    sharding = recipe.sharding
    if sharding != Sharding() and recipe.engine != "fsdp":
        key = next(f.name for f in fields(sharding) if getattr(sharding, f.name) != f.default)
        raise Fault(f"sharding.{key}", getattr(sharding, key), f"needs engine=fsdp, not {recipe.engine}")
    for key, kind in (("gather", sharding.gather), ("reduce", sharding.reduce)):
        if kind == "bf16" and recipe.train.precision != "bf16":
            raise Fault(f"sharding.{key}", "bf16", "needs train.precision=bf16")


def _check_execution(recipe: Recipe) -> None:
    execution = recipe.execution
    buffered = recipe.method.options.execution.kind == "replay buffer"
    hindrances = {
        "compile": {
            "engine=fsdp, which swaps the weights around every step": recipe.engine == "fsdp",
            "execution.recompute, for which dropout would be drawn anew": execution.recompute != "none",
            "pipeline stages": recipe.pipelined,
        },
        "cuda_graph": {
            "execution.compile=true": execution.compile,
            "execution.recompute, which sets back random numbers": execution.recompute != "none",
            "pipeline stages": recipe.pipelined,
            "train.accumulation above 1": recipe.train.accumulation > 1,
            "train.precision=fp16, whose skipped steps are not recorded": recipe.train.precision == "fp16",
            "faults.nonfinite=skip, whose skipped steps are not recorded": recipe.faults.nonfinite == "skip",
            "method.async_mode=buffer, where the host draws the batches": buffered,
            "keys of deepspeed:, in whose place it steps": bool(recipe.deepspeed),
        },
    }
    asked = {"compile": execution.compile, "cuda_graph": execution.cuda_graph}
    for key, found in hindrances.items():
        for hindrance, present in found.items():
            if asked[key] and present:
                raise Fault(f"execution.{key}", "true", f"can't be combined with {hindrance}")
