"""Files of methods: their options are read without PyTorch, and the parts that they are written with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from framework.local import heads, methods, sliding_windows
from framework.local.methods import dgl
from framework.local.trunks import TRUNKS
from framework.model import local_network
from framework.runtime.errors import UserError

LOAD = """
import sys
from framework.local import methods
for name in methods.names():
    methods.load(name).Options().check()
slow = {"torch", "timm", "deepspeed"} & set(sys.modules)
assert not slow, slow
print(len(methods.names()))
"""


def test_options_of_every_method_are_read_without_pytorch() -> None:
    """Whose import takes seconds, which a typo in a recipe should not."""
    done = subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True)
    assert done.stdout.strip() == str(len(methods.names())), done.stderr


def test_every_kind_of_classifier_has_a_trunk() -> None:
    assert get_args(heads.Kind) == tuple(TRUNKS)


def test_a_plan_that_drops_the_execution_of_its_options_is_refused() -> None:
    """As a method does that forgets to hand it on, and bp with the options of dgl."""
    with pytest.raises(
        UserError, match=r"^method.name=bp: its plan must be made with execution=options.exec"
    ):
        local_network("resnet8", "bp", dgl.Options(async_mode="buffer"), image_size=16, num_classes=10)


HEADER = """
from dataclasses import dataclass
from framework.local import LocalUnit, Plan
from framework.local.heads import Classifier
from torch import nn

@dataclass(frozen=True)
class Options:
    pass

"""
#: what a file's plan is -> what is told, after the file's name
PLANS = {
    "def plan(network):\n    return 1": ", line 1: plan fails: TypeError: plan() takes 1 positional",
    "def plan(network, options):\n    pass": ": plan(network, options) gives NoneType, must return a Plan",
    "def plan(network, options):\n    return 1 / 0": ", line 12: plan fails: ZeroDivisionError: division by zero",
    "def plan(network, options):\n    return Plan((LocalUnit(3, 0, 2, nn.Linear(2, 2)),), 3)": (
        "a plan's units must be of class LocalUnit, with text as name"
    ),
    "def plan(network, options):\n    return Plan((LocalUnit('a', 0, 2, nn.Linear(2, 2)),), 3)": (
        "unit a: its head is a Linear, must be a Head"
    ),
}


@pytest.mark.parametrize("number", range(len(PLANS)))
def test_a_plan_that_is_none_is_told_with_its_file(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, message = list(PLANS.items())[number]
    file = tmp_path / f"mine{number}.py"
    file.write_text(HEADER + text + "\n")
    monkeypatch.setattr("framework.config.methods.FOLDER", tmp_path)
    monkeypatch.setattr(methods, "__path__", [str(tmp_path)])
    with pytest.raises(UserError) as refused:
        local_network("resnet8", file.stem, image_size=16, num_classes=10)
    told = str(refused.value)
    assert "\n" not in told and told.startswith(f"{file}{message}" if message[0] in ",:" else message)


def test_sliding_windows_at_the_lower_edge() -> None:
    assert sliding_windows(4, 3) == [(0, 2), (1, 3)]
    assert sliding_windows(4, 3, clip=True) == [(0, 0), (0, 1), (0, 2), (1, 3)]
    assert sliding_windows(4, 1) == sliding_windows(4, 1, clip=True) == [(i, i) for i in range(4)]
    for clip in (False, True):
        with pytest.raises(UserError, match=r"method.window=5: the network has 4 segments, so 1 to 4"):
            sliding_windows(4, 5, clip)
