"""Files of methods: their options are read without PyTorch, and the parts that they are written with."""

from __future__ import annotations

import subprocess
import sys
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


def test_sliding_windows_at_the_lower_edge() -> None:
    assert sliding_windows(4, 3) == [(0, 2), (1, 3)]
    assert sliding_windows(4, 3, clip=True) == [(0, 0), (0, 1), (0, 2), (1, 3)]
    assert sliding_windows(4, 1) == sliding_windows(4, 1, clip=True) == [(i, i) for i in range(4)]
    for clip in (False, True):
        with pytest.raises(UserError, match=r"method.window=5: the network has 4 segments, so 1 to 4"):
            sliding_windows(4, 5, clip)
