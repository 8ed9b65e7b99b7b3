"""Imports of ``framework`` go one way: down the floors that the package's docstring lists, and never in a circle."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import framework

ROOT = Path(framework.__file__).parent
FLOORS = re.findall(r"^\* ``(\w+)``", framework.__doc__ or "", re.MULTILINE)
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}


def imported(module: str, source: str) -> Iterator[str]:
    """Modules of ``framework`` that a module names anywhere: at the top, in a function, or for types only."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            package = node.module or ""
            names = [f"{package}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else package for name in names]
        else:
            continue
        yield from (name for name in names if name in MODULES and name not in (module, "framework"))


def arrows() -> dict[str, set[str]]:
    """Module -> modules that it imports."""
    return {module: set(imported(module, path.read_text())) for module, path in MODULES.items()}


def room(module: str) -> str:
    """The part of the package that a module belongs to."""
    return module.split(".")[1]


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Arrows from a lower floor to a higher one."""
    return [
        f"{module} -> {target}"
        for module, targets in graph.items()
        for target in sorted(targets)
        if module != "framework" and FLOORS.index(room(module)) > FLOORS.index(room(target))
    ]


def test_every_room_has_a_floor() -> None:
    assert {room(module) for module in MODULES if module != "framework"} == set(FLOORS)


def test_imports_go_down() -> None:
    assert upward(arrows()) == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Types and imports inside functions count. A package counts as what its ``__init__`` imports."""
    TopologicalSorter(arrows()).prepare()  # raises CycleError, which names the circle


def test_an_arrow_up_is_found() -> None:
    source = "def f():\n    from framework.training.loop import Loop\n    from framework import train\n"
    graph = {"framework.runtime.errors": set(imported("framework.runtime.errors", source))}
    assert upward(graph) == [
        "framework.runtime.errors -> framework.train",
        "framework.runtime.errors -> framework.training.loop",
    ]


@pytest.mark.parametrize("name", sorted({path.relative_to(ROOT).parts[0] for path in MODULES.values()}))
def test_no_name_is_the_standard_librarys(name: str) -> None:
    """``deepspeed framework/train.py`` puts this folder first on ``sys.path``."""
    assert name.removesuffix(".py") not in sys.stdlib_module_names


def test_names_that_would_be_confused_stand_once() -> None:
    for name in ("step.py", "engine.py", "worker.py", "schedule.py", "loop.py"):
        assert len(list(ROOT.rglob(name))) == 1, name
