"""Options of methods and heads: of the method that is chosen, and of method files of one's own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from framework.config import methods
from framework.config.loading import load, to_yaml
from framework.local import methods as local_methods
from tests.support.recipes import fails


def test_options_of_the_method_that_is_chosen_last(recipes: Path) -> None:
    (recipes / "loco.yaml").write_text(
        "defaults: [base]\nmethod: {name: loco, window: 3, head: {conv_blocks: 2}}\n"
    )
    options = load(["recipes/loco.yaml", "method.head.temperature=0.5"]).method.options
    assert (options.window, options.head.conv_blocks, options.head.temperature) == (3, 2, 0.5)


OTHER = {  # over a recipe of LoCo with these options
    "null first": (["method=null", "method.name=gim"], ""),
    "deleted first": (["~method", "method.name=gim"], ""),
    "another name": (
        ["method.name=gim"],
        "recipes/loco.yaml: dropped method.window, method.head: set for method.name=loco, and it is gim now\n",
    ),
}


@pytest.mark.parametrize("case", OTHER)
def test_options_for_another_method_are_dropped_and_named(
    recipes: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, printed = OTHER[case]
    (recipes / "loco.yaml").write_text(
        "defaults: [base]\nmethod: {name: loco, window: 3, head: {conv_blocks: 2}}\n"
    )
    recipe = load(["recipes/loco.yaml", *overrides, "method.head.temperature=0.5"])
    head = recipe.method.options.head
    assert (recipe.method.name, head.conv_blocks, head.temperature) == ("gim", 0, 0.5)
    assert capsys.readouterr().err == printed


def test_an_option_means_the_method_of_its_own_file_or_of_those_below(
    recipes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file without a name means what is selected below it, or else above it."""
    (recipes / "options.yaml").write_text("method: {window: 3}\n")
    (recipes / "loco.yaml").write_text("defaults: [base, options]\nmethod: {name: loco}\n")
    (recipes / "wider.yaml").write_text("defaults: [loco]\nmethod: {window: 4}\n")
    (recipes / "mlaan.yaml").write_text("defaults: [wider]\nmethod: {name: mlaan, w_casc: 0.5}\n")
    assert load(["recipes/wider.yaml"]).method.options.window == 4
    assert capsys.readouterr().err == ""
    options = load(["recipes/mlaan.yaml"]).method.options
    assert (options.window, options.w_casc) == (3, 0.5)
    assert capsys.readouterr().err.splitlines() == [
        f"recipes/{name}.yaml: dropped method.window: set for method.name=loco, and it is mlaan now"
        for name in ("options", "wider")
    ]
    assert load(["recipes/mlaan.yaml", "method.name=loco"]).method.options.window == 4
    assert "recipes/mlaan.yaml: dropped method.w_casc: set for" in capsys.readouterr().err


def test_an_option_on_the_command_line_must_be_one_of_the_method(recipes: Path) -> None:
    message = fails("recipes/base.yaml", "method.window=3", "method.name=gim")
    assert message.startswith("command line: method.window=3: unknown key for the method chosen")


def test_arguments_for_another_network_are_dropped_and_named(
    recipes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (recipes / "args.yaml").write_text("network: {cut: block, args: {zero_init_last: false}}\n")
    (recipes / "wide.yaml").write_text("defaults: [base, args]\nnetwork: {name: resnet34}\n")
    assert load(["recipes/wide.yaml"]).network.args == {"zero_init_last": False}
    assert capsys.readouterr().err == ""
    network = load(["recipes/wide.yaml", "network.name=resnet18", "network.args.stem_width=32"]).network
    assert (network.cut, network.args) == ("block", {"stem_width": 32})
    assert capsys.readouterr().err == (
        "recipes/args.yaml: dropped network.args: set for network.name=resnet34, and it is resnet18 now\n"
    )


PLAIN = """
from dataclasses import dataclass, field
from framework.config.schema import PositiveInt

@dataclass
class Head:
    width: PositiveInt = 8

@dataclass
class Options:
    window: PositiveInt = 2
    head: Head = field(default_factory=Head)

def plan(network, options):
    ...
"""


@pytest.fixture
def method_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """Writes ``mine.py`` of a folder of methods; returns its path."""
    folder = tmp_path / "methods"
    folder.mkdir()
    monkeypatch.setattr(methods, "FOLDER", folder)
    monkeypatch.setattr(local_methods, "__path__", [str(folder)])

    def write(text: str) -> Path:
        (folder / "mine.py").write_text(text)
        monkeypatch.delitem(sys.modules, "framework.local.methods.mine", raising=False)
        importlib.invalidate_caches()
        methods.load.cache_clear()
        return folder / "mine.py"

    return write


def test_a_method_of_plain_dataclasses(recipes: Path, method_file: Callable[[str], Path]) -> None:
    """As users write it: the base class is added, and every section in it is as strict as our own."""
    method_file(PLAIN)
    recipe = load(["recipes/base.yaml", "method.name=mine", "method.head.width=3"])
    options = recipe.method.options
    assert (options.window, options.head.width, options.execution.kind) == (2, 3, "synchronous")
    Path("recipes/saved.yaml").write_text(to_yaml(recipe))
    assert load(["recipes/saved.yaml"]).method == recipe.method
    argv = ("recipes/base.yaml", "method.name=mine")
    assert fails(*argv, "method.head.width=0").endswith("method.head.width=0: must be at least 1")
    assert fails(*argv, "method.head.widht=3").endswith("the nearest is method.head.width")
    assert fails(*argv, "method.window=2.0").endswith(
        "method.window=2.0: must be a whole number (at least 1)"
    )


BROKEN_METHODS = {
    "no options": (PLAIN.replace("class Options", "class Settings"), ": must define a dataclass Options"),
    "no dataclass": ("class Options: ...\ndef plan(): ...\n", ": must define a dataclass Options"),
    "no default": (PLAIN.replace("PositiveInt = 2", "PositiveInt"), ": Options: window must have a default"),
    "a strange type": (
        PLAIN.replace("window: PositiveInt", "window: slice"),
        ": Options: Unable to generate pydantic-core schema for <class 'slice'>",
    ),
    "no plan": (PLAIN.replace("def plan", "def plans"), ": must define a function plan(network, options)"),
    "an error": (PLAIN + "\nx = y\n", ", line 17: can't be imported: NameError: name 'y' is not defined"),
    "no Python": (PLAIN + "\nx = (\n", ", line 17: can't be imported: '(' was never closed"),
    "no module": (
        "import nowhere\n",
        ", line 1: can't be imported: ModuleNotFoundError: No module named 'nowhere'",
    ),
}


@pytest.mark.parametrize("case", BROKEN_METHODS)
def test_a_broken_method_file_is_named(recipes: Path, method_file: Callable[[str], Path], case: str) -> None:
    text, message = BROKEN_METHODS[case]
    path = method_file(text)
    assert fails("recipes/base.yaml", "method.name=mine").startswith(f"{path}{message}")
