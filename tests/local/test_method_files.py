"""Files of methods: read without PyTorch, checked when they are loaded, enough to add a method."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch

from framework.local import heads, methods, sliding_windows
from framework.local.trunks import TRUNKS
from framework.model import local_network
from framework.runtime.errors import UserError
from tests.support import networks

LOAD = """
import sys
from framework.local import methods
for name in methods.names():
    methods.load(name).Options().check()
slow = {"torch", "timm", "numpy", "deepspeed"} & set(sys.modules)
assert not slow, slow
print(len(methods.names()))
"""


def test_options_of_every_method_are_read_without_pytorch() -> None:
    """Whose import takes seconds, which a typo in a recipe should not."""
    done = subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True)
    assert done.stdout.strip() == str(len(methods.names())), done.stderr


def test_every_kind_of_classifier_has_a_trunk() -> None:
    assert get_args(heads.Kind) == tuple(TRUNKS)


Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Adds a method's file to the package; its name."""
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])

    def add(text: str) -> str:
        name = f"method_{len(list(tmp_path.iterdir()))}_{tmp_path.name}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return add


MINE = """
from __future__ import annotations

from dataclasses import dataclass, field

import torch

from framework.local import Classifier, LocalUnit, MethodOptions, NetworkInfo, Plan, sliding_windows


@dataclass
class Options(MethodOptions):
    window: int = 3
    head: Classifier = field(default_factory=Classifier)


def plan(network: NetworkInfo, options: Options) -> Plan:
    windows = sliding_windows(len(network), options.window, clip=True)
    units = [LocalUnit(network.names[i], a, i, options.head.build(network, i)) for a, i in windows]
    return Plan(tuple(units), len(network))
"""


def test_a_new_method_is_one_file(write: Write) -> None:
    """Windows [i-2..i] with linear heads; it says nowhere that it is supervised."""
    net = local_network("resnet14", write(MINE), image_size=16, num_classes=10, cut="block").train()
    windows = [(u.first, u.last) for u in net.plan.units]
    assert windows == [(0, 0), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5)]
    assert net.plan.supervised and net.classifies
    data = networks.batch(net)
    output = net(data._replace(images=data.images.float()))
    output.loss.backward()
    assert torch.isfinite(output.loss) and all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("class Options(MethodOptions)", "class Option(MethodOptions)"), r"must define a dataclass Options"),
        (
            ("class Options(MethodOptions)", "class Options"),
            r"must define a dataclass Options\(MethodOptions\)",
        ),
        (("@dataclass\n", ""), r"must define a dataclass Options"),
        (("def plan(", "def plans("), r"must define a function plan\(network, options\)"),
    ],
)
def test_a_file_that_is_no_method_is_named(write: Write, change: tuple[str, str], message: str) -> None:
    name = write(MINE.replace(*change))
    with pytest.raises(UserError, match=rf"{name}\.py: {message}") as caught:
        methods.load(name)
    assert "\n" not in str(caught.value)


def test_a_plan_that_drops_the_options_of_its_execution_is_refused(write: Write) -> None:
    name = write(MINE.replace("MethodOptions", "Asynchronous"))
    options = methods.load(name).Options(async_mode="buffer")  # type: ignore[call-arg]
    with pytest.raises(UserError, match=f"method.name={name}: .* execution=options.execution"):
        local_network("resnet14", name, options, image_size=16, num_classes=10, cut="block")


def test_sliding_windows_at_the_lower_edge() -> None:
    assert sliding_windows(4, 3) == [(0, 2), (1, 3)]
    assert sliding_windows(4, 3, clip=True) == [(0, 0), (0, 1), (0, 2), (1, 3)]
    assert sliding_windows(4, 1) == sliding_windows(4, 1, clip=True) == [(i, i) for i in range(4)]
    for clip in (False, True):
        with pytest.raises(UserError, match=r"method.window=5: the network has 4 segments, so 1 to 4"):
            sliding_windows(4, 5, clip)
