"""Steps whose gradients travel: the clock of ``bench_scaling`` by hand, and what ``bench_step`` measures."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import ROOT


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of ``tools`` by name."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module


def test_the_clock_of_a_step(tool: Any) -> None:
    """Two tensors of 40 and 20 bytes, finished 4 and 10 s after the start, needed 1 and 6 s after the next one's."""
    wire = tool("simulated_wire")
    events = [
        wire.Event(1, False, 0, 0),
        wire.Event(4, True, 0, 40),
        wire.Event(6, False, 1, 0),
        wire.Event(10, True, 1, 20),
    ]
    step = wire.Step(10, events)
    at_once, slow = 1e12, 5  # bytes a second; slow: the first travels from 4 to 12, the second from 12 to 16
    for late in (False, True):
        assert wire.step_seconds(step, at_once, late) == pytest.approx(10)
    assert wire.step_seconds(step, slow, late=False, overlap=False) == pytest.approx(10 + 12)
    assert wire.step_seconds(step, slow, late=False) == pytest.approx(16)
    # Needed at 11 and 16: the first is there at 12, so that the step is a second late, in every step more and more,
    # until a step takes as long as its tensors travel.
    assert wire.step_seconds(step, slow, late=True) == pytest.approx(12)
    assert wire.step_seconds(step, 60 / 9, late=True) == pytest.approx(10)
    assert wire.step_seconds(step.at_speed(2), 10, late=False) == pytest.approx(8)
    assert wire.ring(16, 100) == pytest.approx(100e9 / 8 / 1.875)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 0), (1, 1), (2, 2)])
def test_communication_is_measured(
    tool: Any, tmp_path: Path, monkeypatch: Any, ranks: int, stage: int
) -> None:
    bench, written = tool("bench_step"), tmp_path / "rows.json"
    monkeypatch.setenv("LOCAL_RANK", "0")  # the tool sets it
    how = [*(["--wire", 0.3] if ranks == 1 else ["--ranks", ranks]), "--zero-stage", stage]
    network = ["--network", "resnet8", "--image-size", 16, "--batch", 4, "--method", "gim,loco"]
    monkeypatch.setattr(
        "sys.argv", ["bench_step", *map(str, [*network, "--rounds", 1, *how, "--json", written])]
    )
    bench.main()
    rows = {row["method"]: row for row in json.loads(written.read_text())}
    assert rows.keys() == {"ddp", "gim", "loco"} and all(row["ranks"] == ranks for row in rows.values())
    assert all(row["travel_seconds"] > 0 and row["late_seconds"] for row in (rows["gim"], rows["loco"]))
    assert rows["ddp"]["hidden_late"] is None


@pytest.mark.slow
def test_a_step_is_recorded(tool: Any, tmp_path: Path, monkeypatch: Any) -> None:
    bench, written = tool("bench_scaling"), tmp_path / "rows.json"
    argv = ["--network", "resnet8", "--image-size", 16, "--batch", 4, "--rounds", 1, "--gbit", "1,10"]
    monkeypatch.setattr("sys.argv", ["bench_scaling", *map(str, [*argv, "--json", written])])
    bench.main()
    rows = json.loads(written.read_text())
    assert [(row["gbit"], row["method"]) for row in rows] == [
        (gbit, method) for gbit in (1, 10) for method in ("ddp", "gim", "loco")
    ]
    assert all(
        0 < row["no overlap"] <= row["early"] + 1e-9 <= row["late"] + 2e-9
        for row in rows
        if row["method"] != "ddp"
    )
    assert rows[0]["seconds"] == pytest.approx(256 / 2500)
