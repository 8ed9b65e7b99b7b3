"""Traces of some steps, and nothing of the others."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from framework.runtime.errors import LocalError
from framework.tracking.profiling import StepProfiler

CPU = torch.device("cpu")


def make(steps: range, profiler: StepProfiler) -> None:
    """Steps of which each has its own operation."""
    operations = [torch.cos, torch.exp, torch.tanh, torch.log1p]
    for step in steps:
        profiler.begin(step)
        operations[step](torch.ones(3))


def events(trace: Path) -> set[str]:
    with gzip.open(trace) as file:
        return {event.get("name") for event in json.load(file)["traceEvents"]}


def test_a_trace_holds_the_operations_of_its_steps(tmp_path: Path) -> None:
    pauses = []

    @contextmanager
    def paused() -> Iterator[None]:
        pauses.append(profiler)
        yield

    with StepProfiler(range(1, 3), tmp_path, CPU, paused) as profiler:
        make(range(1), profiler)
        assert not pauses, "nothing has begun"
        make(range(1, 4), profiler)
        assert len(pauses) == 2, "it is written before the next step"
    names = events(tmp_path / "profile" / "steps-00000001-00000002.json.gz")
    assert {"step 1", "aten::exp", "step 2", "aten::tanh"} <= names
    assert not {"step 0", "aten::cos", "step 3", "aten::log1p"} & names


@pytest.mark.slow
def test_a_run_that_ends_early_leaves_what_it_traced(tmp_path: Path) -> None:
    with StepProfiler(range(2, 9), tmp_path, CPU) as profiler:
        make(range(4), profiler)
    assert "aten::log1p" in events(tmp_path / "profile" / "steps-00000002-00000003.json.gz")
    with StepProfiler(range(9), tmp_path / "none", CPU):
        pass
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_nothing_is_written_after_an_error_or_where_nothing_may_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ZeroDivisionError), StepProfiler(range(9), tmp_path, CPU) as profiler:
        make(range(2), profiler)
        raise ZeroDivisionError

    def lost() -> None:
        raise LocalError("another process has it")

    with pytest.raises(LocalError), StepProfiler(range(9), tmp_path, CPU, check=lost) as profiler:
        make(range(2), profiler)
    assert not list(tmp_path.iterdir())
    (tmp_path / "profile").touch()  # where its folder should be
    with StepProfiler(range(9), tmp_path, CPU) as profiler:
        make(range(2), profiler)
    assert caplog.messages == [f"{tmp_path / 'profile'}: no profile: File exists"]
