"""Recipes: YAML files that are differences to the schema in ``recipe``, and overrides on the command line.

    recipe = load(["recipes/quickstart.yaml", "seed=1", "optim.lr=0.1"])

``composition`` reads the files, ``overrides`` the command line, ``selection`` drops what was set for another method,
``schema`` checks every key and value, ``checks`` what keys have to do with each other. Nothing here imports PyTorch, so
that a mistake is told at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from framework.config import methods, overrides, selection
from framework.config.checks import check
from framework.config.composition import Source, merge, origin, recipe_files
from framework.config.method_options import MethodOptions
from framework.config.recipe import Method, Network, Recipe
from framework.config.renamed import renamed
from framework.config.schema import Fault, build, keys
from framework.config.tree import Tree
from framework.runtime.command import Parser
from framework.runtime.errors import UserError
from framework.runtime.launch import launched_rank

_SELECTORS = (
    selection.Selector("method", Method.name),
    selection.Selector("network", Network.name, others=("args",)),
)


def load(argv: Sequence[str]) -> Recipe:
    """The recipe of a command line: a path, then overrides as ``overrides`` lists them.

    What a recipe sets for another method or network than is selected in the end is dropped, and rank 0 prints a line
    about it.

    Raises:
        UserError: the file, key or value at fault, with the nearest known name or what would be right.
    """
    parser = Parser(description="Train a network with local losses.")
    parser.add_argument("recipe", nargs="?", type=Path, help="a file such as recipes/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as optim.lr=0.1")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # from the launcher
    arguments = parser.parse_intermixed_args(argv)
    if arguments.recipe is None:
        parser.error("name a recipe, such as recipes/quickstart.yaml")
    path: Path = arguments.recipe
    parsed = [overrides.parse(text) for text in arguments.overrides]
    overrides.check_repeated(parsed)
    sources, idle = overrides.apply(recipe_files(path), parsed)
    for source in sources:
        _refuse_old_names(source)
    for selector in _SELECTORS:
        sources, lines = selection.drop(sources, selector)
        for line in lines if launched_rank() == 0 else ():
            print(line, file=sys.stderr)
    known = [key for key in keys(Recipe) if key != "method.options"]
    try:
        return _recipe(path.stem, [source.tree for source in sources], known, idle)
    except Fault as fault:
        where = origin(fault.key.split("[")[0], sources) or path
        where = overrides.COMMAND_LINE if fault.key.startswith("~") else where
        raise UserError(f"{where}: {_explain(fault, known)}") from fault


def to_yaml(recipe: Recipe) -> str:
    """The whole recipe, which ``load`` reads again."""
    tree = asdict(recipe)
    tree["method"] = {"name": recipe.method.name, **tree["method"]["options"]}
    return OmegaConf.to_yaml(OmegaConf.create(tree))


def _recipe(
    name: str, layers: Sequence[Tree], known: list[str], idle: Sequence[overrides.Override]
) -> Recipe:
    """The recipe of these layers over the schema's defaults; ``known`` gets the keys of the method's options, too.

    Raises:
        Fault: a key or value that does not fit.
    """
    defaults = asdict(Recipe())
    del defaults["method"]["options"]
    layers = [{"name": name}, *layers]
    options = _options_class(merge(defaults, *layers)["method"])
    known += keys(options, "method")
    for override in idle:
        if override.key not in known:
            raise Fault(
                f"~{override.key}", {}, "nothing sets it" if _in_a_dictionary(override.key, known) else ""
            )
    tree = merge(defaults, {"method": asdict(options())}, *layers)  # type: ignore[call-overload]
    recipe = _build(tree, options)
    check(recipe)
    return recipe


def _options_class(node: Any) -> type[MethodOptions]:
    """The ``Options`` of the method that the ``method:`` section names."""
    if not isinstance(node, dict):
        raise Fault("method", node, "must be a section with the key name and the method's options")
    if node["name"] not in methods.names():
        raise Fault("method.name", node["name"], f"must be one of {', '.join(methods.names())}")
    return methods.load(node["name"]).Options


def _build(tree: Tree, options: type[MethodOptions]) -> Recipe:
    name = tree["method"].pop("name")
    method = Method(name, build(options, tree.pop("method"), "method"))
    recipe = build(Recipe, tree)
    return replace(
        recipe,
        method=method,
        run_dir=os.path.expanduser(recipe.run_dir),  # a shell leaves the ~ of key=~/folder alone
        data=replace(recipe.data, path=os.path.expanduser(recipe.data.path)),
    )


def _refuse_old_names(source: Source) -> None:
    for old in renamed(source.tree):
        raise UserError(
            f"{source.where}: {old.key}={old.value}: has another name now: {old.new_key}={old.new_value}"
        )


def _in_a_dictionary(key: str, known: Sequence[str]) -> bool:
    """Whether a key lies in a dictionary such as ``deepspeed``, of which the schema knows no keys."""
    above = key.rpartition(".")[0]
    sections = {name.rpartition(".")[0] for name in known}
    return bool(above) and ((above in known and above not in sections) or _in_a_dictionary(above, known))


def _explain(fault: Fault, known: Sequence[str]) -> str:
    if fault.problem:
        problem = fault.problem
    elif fault.key in known:
        problem = "a file has no dotted keys; indent the last part below the first"
    else:
        scope = " for the method chosen" if fault.key.startswith("method.") else ""
        allowed = [key for key in known if key.startswith("method.")] if scope else known
        problem = f"unknown key{scope}; the nearest is {_nearest(fault.key.lstrip('~'), allowed)}"
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
