"""Files of methods: their options are read without PyTorch, and the parts that they are written with."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from framework.data.batch import Batch
from framework.local import LocalUnit, Plan, heads, methods, sliding_windows
from framework.local.head import Head
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


class Gives(Head):
    """Whose loss is whatever it was made with."""

    def __init__(self, loss: object) -> None:
        super().__init__()
        self.given = loss

    def loss(self, x: Tensor, batch: Batch) -> Any:
        return self.given


@pytest.mark.parametrize(
    ("loss", "given"),
    [
        (torch.zeros(1), "(1,) torch.float32"),
        (torch.zeros(3), "(3,) torch.float32"),
        (torch.tensor(1), "() torch.int64"),
        (1.0, "float"),
        (None, "NoneType"),
    ],
)
def test_a_loss_must_be_a_scalar(loss: object, given: str) -> None:
    with pytest.raises(UserError) as refused:
        Gives(loss)(torch.zeros(2, 4, 1, 1), Batch(torch.zeros(2, 3, 8, 8)))
    assert str(refused.value).startswith(f"Gives.loss gives {given}: must give a scalar")


def test_batches_and_classes_that_do_not_fit() -> None:
    net = local_network("resnet8", "loco", image_size=16)
    with pytest.raises(UserError, match="15 images: must be a multiple of the batch's 2 views"):
        net(Batch(torch.zeros(15, 3, 16, 16), views=2))
    with pytest.raises(UserError, match="num_classes=0: method dgl classifies, so it must be at least 1"):
        local_network("resnet8", "dgl", image_size=16)
    with pytest.raises(UserError, match="num_classes=-3: must be at least 0"):
        local_network("resnet8", "dgl", image_size=16, num_classes=-3)


@pytest.mark.parametrize(
    ("unit", "message"),
    [
        ({"name": ""}, "with text as name"),
        ({"first": 0.0}, "unit u: first and last must be numbers of segments"),
        ({"weight": "1"}, "unit u: weight 1 must be a number"),
        ({"weight": math.inf}, "unit u: weight inf must be above 0, and finite"),
        ({"trains": [1]}, "unit u: trains [1] must be a set of numbers of segments"),
    ],
)
def test_units_as_they_can_not_be(unit: dict[str, Any], message: str) -> None:
    asked: dict[str, Any] = {"name": "u", "first": 0, "last": 2, "head": Gives(None), **unit}
    with pytest.raises(UserError) as refused:
        Plan((LocalUnit(**asked),), 3)
    assert message in str(refused.value)


def test_sliding_windows_at_the_lower_edge() -> None:
    assert sliding_windows(4, 3) == [(0, 2), (1, 3)]
    assert sliding_windows(4, 3, clip=True) == [(0, 0), (0, 1), (0, 2), (1, 3)]
    assert sliding_windows(4, 1) == sliding_windows(4, 1, clip=True) == [(i, i) for i in range(4)]
    for clip in (False, True):
        with pytest.raises(UserError, match=r"method.window=5: the network has 4 segments, so 1 to 4"):
            sliding_windows(4, 5, clip)
