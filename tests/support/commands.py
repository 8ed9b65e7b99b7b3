"""The commands in ``tools`` as users start them, in this process."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def run_tool(name: str, *arguments: object) -> object:
    """Its exit status."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(TOOLS / f"{name}.py"), run_name="__main__")
    return left.value.code


def tool(name: str) -> dict[str, Any]:
    """What is defined in it, by name."""
    return runpy.run_path(str(TOOLS / f"{name}.py"))
