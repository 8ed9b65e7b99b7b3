"""The report on a GPU: what it covers, and that no crash, hang or end of its minutes loses anything."""

from __future__ import annotations

import importlib
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from framework.runtime.errors import UserError
from tests.support.commands import run_tool
from tests.support.marks import slow
from tests.support.runs import ROOT

HERE = {"device": "a chip", "commit": "abc", "versions": {"torch": "2"}}

#: works on the items that are not done: ``fine`` passes, ``wrong`` fails, ``dies`` kills its process, ``hangs`` waits
SCRIPT = """
import os, signal, sys, threading
from pathlib import Path
from gpu_events import Events, ends, read
path, name, *items = sys.argv[1:]
events, done = Events(Path(path), name), ends(read(Path(path)), name)
events.add("items", items=items)
for item in items:
    if item not in done:
        with events.item(item):
            print("last words of", item, flush=True)
            if item.startswith("dies"):
                os.kill(os.getpid(), signal.SIGSEGV)
            if item.startswith("hangs"):
                threading.Event().wait()
            if item.startswith("wrong"):
                raise ValueError("no such kernel")
"""


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of ``tools`` by name."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module


def scripted(tool: Any, names: str, limit: float = 60.0) -> Any:
    """A piece whose process is ``SCRIPT``."""
    pieces = tool("gpu_pieces")

    @dataclass(frozen=True)
    class Scripted(pieces.Piece):  # type: ignore[misc]
        def command(self, items: list[str], out: Path, device: str) -> list[str]:
            return [sys.executable, "-c", SCRIPT, str(out / pieces.EVENTS), self.name, *names.split()]

    return Scripted("piece", 0.1, limit)


def work(tool: Any, folder: Path, piece: Any, minutes: float = 5.0, again: bool = False) -> Any:
    """A call of the report with one piece; its record."""
    module = tool("gpu_work")
    record = module.Record(folder / tool("gpu_pieces").EVENTS)
    record.begin(HERE, again)
    module.Work(record, "cpu", minutes).on(piece)
    record.write_failures(folder / "failures.md", (piece,))
    return record


def outcomes(record: Any, piece: Any) -> dict[str, str]:
    return {item: end["outcome"] for item, end in record.ends(piece).items()}


@pytest.mark.parametrize("ending", ["dies", *slow(["hangs"])])
def test_what_dies_or_hangs_costs_its_own_item(tool: Any, tmp_path: Path, ending: str) -> None:
    piece = scripted(tool, f"fine-1 {ending} fine-2 wrong fine-3", limit=60.0 if ending == "dies" else 5.0)
    found = outcomes(work(tool, tmp_path, piece), piece)
    assert found == {
        "fine-1": "passed",
        ending: "failed",
        "fine-2": "passed",
        "wrong": "failed",
        "fine-3": "passed",
    }
    text = (tmp_path / "failures.md").read_text()
    reason = "its process ended with status -11" if ending == "dies" else "no sign for 5 s: it was ended"
    assert f"## piece: {ending}" in text and "last words" in text and reason in text
    assert "no such kernel" in text and "| piece | 3 | 2 | 0 | 0 |" in text


def test_a_second_call_goes_on_and_repeats_what_failed_if_asked_to(tool: Any, tmp_path: Path) -> None:
    piece = scripted(tool, "fine-1 wrong fine-2")
    idle = work(tool, tmp_path, piece, minutes=0.0)
    assert outcomes(idle, piece) == {} and idle.summary((piece,))[0][4] == "all"
    work(tool, tmp_path, piece)
    lines = (tmp_path / "report.jsonl").read_text().splitlines()
    work(tool, tmp_path, piece)
    after = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()[len(lines) :]]
    assert [event["event"] for event in after] == ["began"]
    record = work(tool, tmp_path, scripted(tool, "fine-1 wrong fine-2"), again=True)
    starts = [event["item"] for event in record.events if event["event"] == "start"]
    assert starts == ["fine-1", "wrong", "fine-2", "wrong"]


def test_a_process_that_comes_to_nothing_is_a_failure_until_it_does(tool: Any, tmp_path: Path) -> None:
    piece, nothing = scripted(tool, "fine-1"), scripted(tool, "")
    object.__setattr__(nothing, "command", lambda *_: [sys.executable, "-c", "raise SystemExit('no torch')"])
    assert outcomes(work(tool, tmp_path, nothing), nothing) == {"its process": "failed"}
    assert "no torch" in (tmp_path / "failures.md").read_text()
    assert outcomes(work(tool, tmp_path, piece), piece) == {"fine-1": "passed"}


def test_a_report_is_of_one_device(tool: Any, tmp_path: Path) -> None:
    piece = scripted(tool, "fine-1")
    work(tool, tmp_path, piece, minutes=0.0)
    with pytest.raises(
        UserError, match=r"report.jsonl: is of a chip, and this is another: set another --out"
    ):
        tool("gpu_work").Record(tmp_path / "report.jsonl").begin({**HERE, "device": "another"}, False)


def test_every_test_marked_gpu_is_in_a_piece(tool: Any) -> None:
    listed = {name for piece in tool("gpu_pieces").pieces("cuda") for name in piece.tests}
    marked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if "pytest.mark.gpu" in path.read_text() and path.name != Path(__file__).name
    }
    assert listed == marked


def test_rows_are_ones_that_the_benchmarks_take(tool: Any) -> None:
    bench, benched = tool("bench_step"), tool("benched_steps")
    pieces = tool("gpu_pieces").pieces("cuda")
    rows = [options for piece in pieces for options in piece.rows.values() if options]
    for options in rows:
        arguments = bench.argument_parser().parse_args(shlex.split(options))
        benched.check(arguments.method, arguments.head)
    assert len(rows) == len(set(rows)) == 23
    assert len({piece.name for piece in pieces}) == len(pieces)


@pytest.mark.slow
def test_the_rehearsal_comes_to_its_end(tool: Any, tmp_path: Path) -> None:
    assert run_tool("gpu_report", "--device", "cpu", "--out", tmp_path) == 0
    record = tool("gpu_work").Record(tmp_path / "report.jsonl")
    pieces = tool("gpu_pieces").pieces("cpu")
    rows = {name: tuple(map(int, numbers[:4])) for name, *numbers in record.summary(pieces)}
    assert all(failed == 0 and todo == 0 for _, failed, _, todo in rows.values())
    for name in ("CUDA graphs, measuring", "no waiting", "runs, compile"):
        assert rows[name][0] == 0 and rows[name][2] > 0  # needs a GPU, and does not pass
    for name in ("methods", "precision", "loading", "engines", "rows"):
        assert rows[name][0] > 0
    (*_, last) = (tmp_path / "failures.md").read_text().splitlines()
    assert last.endswith("of its items: needs a GPU")
    assert len((tmp_path / "step_cpu_rehearsal.csv").read_text().splitlines()) == 3
