"""What became of every item of a report on a GPU: a line of JSON each, added by whoever works on it.

As a plugin of pytest (``-p gpu_events --events FILE --piece NAME``) it writes what becomes of every test, and
leaves out those of which the file knows it. The file is whole up to its last line whenever a process is killed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

LINES = 30  # of a traceback that are kept
PROCESS = "its process"  # the item that fails where a process comes to none


class Events:
    """Adds lines to a file on behalf of a piece of the report.

    Args:
        path: the file; others may add to it, too.
        piece: name.
    """

    def __init__(self, path: Path, piece: str) -> None:
        self.path, self.piece = path, piece

    def add(self, event: str, **values: Any) -> None:
        """A line with the time."""
        line = {"event": event, "piece": self.piece, "time": round(time.time(), 3), **values}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def end(self, item: str, outcome: str, seconds: float, text: str = "") -> None:
        """An item has ``passed``, ``failed`` or been ``skipped``; of a long text the last lines are kept."""
        text = "\n".join(text.strip().splitlines()[-LINES:])
        self.add("end", item=item, outcome=outcome, seconds=round(seconds, 3), text=text)

    @contextmanager
    def item(self, name: str) -> Iterator[None]:
        """Inside, an item is worked on: what is raised is noted, and the next can follow."""
        import traceback

        self.add("start", item=name)
        start = time.monotonic()
        try:
            yield
        except Exception:
            self.end(name, "failed", time.monotonic() - start, traceback.format_exc())
        else:
            self.end(name, "passed", time.monotonic() - start)


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a file; none if it isn't there."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:  # its writer was killed
            continue
    return found


def ends(events: list[dict[str, Any]], piece: str) -> dict[str, dict[str, Any]]:
    """Item of a piece -> its last end. What failed before a call that repeats it has none."""
    found: dict[str, dict[str, Any]] = {}
    for event in events:
        if event["event"] == "began" and event["again"]:
            found = {item: end for item, end in found.items() if end["outcome"] != "failed"}
        if event["piece"] == piece and event["event"] == "items":
            found.pop(PROCESS, None)  # it has come so far
        if event["piece"] == piece and event["event"] == "end":
            found[event["item"]] = event
    return found


class _Tests:
    """Hooks of pytest."""

    def __init__(self, events: Events) -> None:
        self.events = events

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        done = ends(read(self.events.path), self.events.piece)
        self.events.add("items", items=[item.nodeid for item in session.items])
        session.items = [item for item in session.items if item.nodeid not in done]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.events.add("start", item=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            text = report.longreprtext
            if report.skipped and isinstance(report.longrepr, tuple):
                text = report.longrepr[2].removeprefix("Skipped: ")
            self.events.end(report.nodeid, report.outcome, report.duration, text)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--events", type=Path, help="file to which what becomes of every test is added")
    parser.addoption("--piece", default="", help="name that it is added under")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--events"):
        events = Events(config.getoption("--events"), config.getoption("--piece"))
        config.pluginmanager.register(_Tests(events))
