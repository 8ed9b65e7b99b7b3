"""Recipes: YAML files that are differences to the schema in ``recipe``, and overrides on the command line.

    recipe = load(["recipes/quickstart.yaml", "seed=1", "optim.lr=0.1"])

``composition`` merges the files and the overrides, ``schema`` checks every key and value.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from framework.config.composition import merge, origin, parse_overrides, recipe_files
from framework.config.recipe import Method, Recipe
from framework.config.schema import Fault, build, keys
from framework.local import methods
from framework.runtime.errors import UserError


def load(argv: Sequence[str]) -> Recipe:
    """The recipe of a command line: a path, then overrides ``a.b=c``.

    Raises:
        UserError: the file, key or value at fault, with the nearest known name or what would be right.
    """
    parser = argparse.ArgumentParser(description="Train a network with local losses.")
    parser.add_argument("recipe", type=Path, help="a file such as recipes/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as optim.lr=0.1")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # from the launcher
    arguments = parser.parse_intermixed_args(argv)
    path, overrides = arguments.recipe, parse_overrides(arguments.overrides)
    sources = [*recipe_files(path), *overrides]
    layers = [{"name": path.stem}, *(source.tree for source in sources)]
    known = [key for key in keys(Recipe) if key != "method.options"]
    try:
        options = _options_class(merge(_defaults(), *layers)["method"])
        known += keys(options, "method")
        recipe = _build(merge(_defaults(), {"method": asdict(options())}, *layers), options)
        _check(recipe)
    except Fault as fault:
        where = origin(fault.key.split("[")[0], sources) or path
        raise UserError(f"{where}: {_explain(fault, known)}") from fault
    return recipe


def to_yaml(recipe: Recipe) -> str:
    """The whole recipe, which ``load`` reads again."""
    tree = asdict(recipe)
    tree["method"] = {"name": recipe.method.name, **tree["method"]["options"]}
    return OmegaConf.to_yaml(OmegaConf.create(tree))


def _defaults() -> dict[str, Any]:
    tree = asdict(Recipe())
    del tree["method"]["options"]
    return tree


def _options_class(node: Any) -> type:
    """The ``Options`` of the method that the ``method:`` section names."""
    if not isinstance(node, dict):
        raise Fault("method", node, "must be a section with the key name and the method's options")
    if node["name"] not in methods.names():
        raise Fault("method.name", node["name"], f"must be one of {', '.join(methods.names())}")
    options: type = methods.load(node["name"]).Options
    return options


def _build(tree: dict[str, Any], options: type) -> Recipe:
    name = tree["method"].pop("name")
    method = Method(name, build(options, tree.pop("method"), "method"))
    recipe = build(Recipe, tree)
    recipe.method = method
    recipe.run_dir = os.path.expanduser(recipe.run_dir)  # a shell leaves the ~ of key=~/folder alone
    recipe.data.path = os.path.expanduser(recipe.data.path)
    return recipe


def _check(recipe: Recipe) -> None:
    """What no single key can show."""
    warmup, epochs = recipe.optim.warmup_epochs, recipe.train.epochs
    if warmup > epochs:
        raise Fault("optim.warmup_epochs", warmup, f"must be at most train.epochs={epochs}")
    recipe.method.options.check()
    _check_pipeline(recipe)
    _check_execution(recipe)


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


def _check_execution(recipe: Recipe) -> None:
    execution = recipe.execution
    replays = recipe.method.options.execution.kind == "replay buffer"
    hindrances = {
        "compile": {
            "engine=fsdp, which swaps the weights around every step": recipe.engine == "fsdp",
            "pipeline stages": recipe.pipelined,
        },
        "cuda_graph": {
            "execution.compile=true": execution.compile,
            "pipeline stages": recipe.pipelined,
            "train.accumulation above 1": recipe.train.accumulation > 1,
            "train.precision=fp16, whose loss scales the host reads": recipe.train.precision == "fp16",
            "faults.nonfinite=skip, where the host looks at every step": recipe.faults.nonfinite == "skip",
            "method.async_mode=buffer, where the host draws the batches": replays,
            "keys of deepspeed:, in whose place it steps": bool(recipe.deepspeed),
        },
    }
    for key, found in hindrances.items():
        for hindrance, present in found.items():
            if getattr(execution, key) and present:
                raise Fault(f"execution.{key}", "true", f"can't be combined with {hindrance}")


def _explain(fault: Fault, known: Sequence[str]) -> str:
    if fault.problem:
        problem = fault.problem
    elif fault.key in known:
        problem = "a file has no dotted keys; indent the last part below the first"
    else:
        scope = " for the method chosen" if fault.key.startswith("method.") else ""
        allowed = [key for key in known if key.startswith("method.")] if scope else known
        problem = f"unknown key{scope}; the nearest is {_nearest(fault.key, allowed)}"
    if isinstance(fault.value, dict):
        return f"{fault.key}: {problem}"
    return f"{fault.key}={'null' if fault.value is None else fault.value}: {problem}"


def _nearest(key: str, known: Sequence[str]) -> str:
    """The known key whose last part is most like that of ``key``, the same section going first."""
    section, _, last = key.rpartition(".")

    def likeness(candidate: str) -> float:
        its_section, _, its_last = candidate.rpartition(".")
        return SequenceMatcher(None, last, its_last).ratio() + 0.3 * (section == its_section)

    return max(known, key=likeness)
