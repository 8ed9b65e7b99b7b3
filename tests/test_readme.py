"""The README's example runs as it stands."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_plain_pytorch_example(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    exec(compile(code, str(README), "exec"), {})
    printed = [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines()]
    assert [list(losses) for losses in printed] == [["layer2", "layer3", "layer4"]] * 3
    for losses in printed:
        # 16 random embeddings against 14 negatives: chance is log 15.
        assert all(1.5 < loss < 4.5 for loss in losses.values())
