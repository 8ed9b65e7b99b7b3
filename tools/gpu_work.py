"""How ``gpu_report`` works: a process at a time, watched, and a record from which the next call goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import gpu_events
from gpu_events import Events
from gpu_pieces import ROOT, Device, Piece
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from framework.runtime.errors import UserError
from framework.runtime.files import write_whole

START = 12.0  # seconds that a process takes to its first item, until some have been measured
POLL = 0.1
GRACE = 5.0  # seconds for a stack to be printed by a process that hangs, or for one to end
TAIL = 40  # lines of what a process that died has printed
FINE = (0, 5)  # statuses of a process that found no item to work on; 5 is pytest's


class Record:
    """What became of every item so far, from a file of events.

    Attributes:
        path: the file.
        events: its lines.
        here: device and commit of the latest call.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events: list[dict[str, Any]] = []
        self.refresh()

    def refresh(self) -> int:
        """Read what has been added; the number of lines."""
        self.events = gpu_events.read(self.path)
        return len(self.events)

    def begin(self, here: dict[str, Any], again: bool) -> None:
        """Note that a call has started, on a device of the same kind as those before.

        Raises:
            UserError: the report is of another device.
        """
        devices = {event["device"] for event in self.events if event["event"] == "began"}
        if devices - {here["device"]}:
            raise UserError(
                f"{self.path}: is of {min(devices)}, and this is {here['device']}: set another --out"
            )
        Events(self.path, "").add("began", again=again, **here)
        self.refresh()

    def items(self, piece: Piece) -> list[str] | None:
        """All items of a piece, as they were last listed; ``None`` if they have not been yet."""
        listed = [e["items"] for e in self.events if e["event"] == "items" and e["piece"] == piece.name]
        return list(piece.rows) or (listed[-1] if listed else None)

    def ends(self, piece: Piece) -> dict[str, dict[str, Any]]:
        """Item -> its last end."""
        return gpu_events.ends(self.events, piece.name)

    def todo(self, piece: Piece) -> list[str] | None:
        """Items without an end; ``None`` if it is not known which there are."""
        items, ends = self.items(piece), self.ends(piece)
        return None if items is None else [item for item in items if item not in ends]

    def each(self, piece: Piece) -> float:
        """Seconds that one more item of a piece may be expected to take."""
        seconds = [end["seconds"] for end in self.ends(piece).values() if end["outcome"] == "passed"]
        return sum(seconds) / len(seconds) if seconds else piece.each

    def start(self) -> float:
        """Seconds that a process may be expected to take to its first item."""
        seconds = [event["seconds"] for event in self.events if event["event"] == "started"]
        return sum(seconds) / len(seconds) if seconds else START

    def summary(self, pieces: tuple[Piece, ...]) -> list[tuple[str, ...]]:
        """A line for each piece: items that passed, failed, were skipped, are to be done; seconds."""
        rows = []
        for piece in pieces:
            ends, todo = self.ends(piece), self.todo(piece)
            counts = Counter(end["outcome"] for end in ends.values())
            numbers = [str(counts[outcome]) for outcome in ("passed", "failed", "skipped")]
            seconds = sum(end["seconds"] for end in ends.values())
            rows.append((piece.name, *numbers, "all" if todo is None else str(len(todo)), f"{seconds:.0f}"))
        return rows

    def write_failures(self, path: Path, pieces: tuple[Piece, ...]) -> int:
        """Write down what failed and why, what was left out, and what is to be done; number of failures."""
        (*_, here) = (event for event in self.events if event["event"] == "began")
        versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
        lines = ["# What failed", "", f"{here['device']}; commit {here['commit']}; {versions}", ""]
        lines += ["| piece | passed | failed | skipped | to do | seconds |", "|---|--:|--:|--:|--:|--:|"]
        lines += [f"| {' | '.join(row)} |" for row in self.summary(pieces)]
        ends = [(piece, item, end) for piece in pieces for item, end in self.ends(piece).items()]
        failed = [(piece, item, end) for piece, item, end in ends if end["outcome"] == "failed"]
        for piece, item, end in failed:
            lines += ["", f"## {piece.name}: {item}", "", "```", end["text"].replace("```", "'''"), "```"]
        reasons = Counter((piece.name, end["text"]) for piece, _, end in ends if end["outcome"] == "skipped")
        if reasons:
            lines += ["", "## Left out", ""]
            lines += [f"* {name}: {number} of its items: {text}" for (name, text), number in reasons.items()]
        write_whole(path, "\n".join(lines) + "\n")
        return len(failed)


class Work:
    """Works on pieces until the minutes are over.

    Args:
        record: what is done, and where what will be done goes.
        device: where.
        minutes: from now.
    """

    def __init__(self, record: Record, device: Device, minutes: float) -> None:
        self.record, self.device, self.out = record, device, record.path.parent
        self.deadline = time.monotonic() + 60 * minutes
        self.console = Console()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def track(self, pieces: tuple[Piece, ...]) -> Iterator[Piece]:
        """The pieces, with a bar."""
        with self._bar:
            task = self._bar.add_task("", total=len(pieces))
            for piece in pieces:
                self._bar.update(task, description=piece.name)
                yield piece
                self._bar.advance(task)

    def on(self, piece: Piece) -> None:
        """Run processes until no item of the piece is left, or no time; say what came out."""
        before = self.record.ends(piece)
        while (todo := self.record.todo(piece)) is None or todo:
            fit = int((self.left - self.record.start()) / max(self.record.each(piece), 0.01))
            if fit < 1 or not self._run(piece, (todo or [])[:fit]):
                break
        ends = self.record.ends(piece)
        counts = Counter(end["outcome"] for item, end in ends.items() if end != before.get(item))
        said = ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items()))
        todo = self.record.todo(piece)
        rest = "" if todo == [] else f"; to do: {'all' if todo is None else len(todo)}"
        self.console.print(f"{piece.name}: {said or 'nothing new'}{rest}", highlight=False)

    def _run(self, piece: Piece, items: list[str]) -> bool:
        """One process; what it dies of is the failure of the item that it was at. Whether it came to an item's end."""
        first = self.record.refresh()
        begun = time.monotonic()
        with (self.out / "log.txt").open("a") as log:
            offset = log.tell()
            process = subprocess.Popen(
                piece.command(items, self.out, self.device),
                cwd=ROOT,
                env=self._environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                reason = self._watched(process, piece, begun)
            finally:
                _end(process)
        self.record.refresh()
        new = [event for event in self.record.events[first:] if event["event"] in ("start", "end")]
        if reason is None:  # the minutes are over: the item that it was at comes again
            return False
        at = new[-1]["item"] if new and new[-1]["event"] == "start" else None
        if at is None and (new or process.returncode in FINE):
            return bool(new)
        with (self.out / "log.txt").open(errors="replace") as log:
            log.seek(offset)
            printed = "\n".join(log.read().splitlines()[-TAIL:])
        seconds = time.monotonic() - begun
        Events(self.record.path, piece.name).end(
            at or gpu_events.PROCESS, "failed", seconds, f"{printed}\n{reason}"
        )
        self.record.refresh()
        return at is not None

    def _watched(self, process: subprocess.Popen[bytes], piece: Piece, begun: float) -> str | None:
        """How it ended; ``None`` if the minutes were over first."""
        lines, last, started = len(self.record.events), begun, False
        while process.poll() is None:
            time.sleep(POLL)
            if (now := self.record.refresh()) != lines:
                lines, last = now, time.monotonic()
                if not started and self.record.events[-1]["event"] in ("start", "end"):
                    started = True
                    seconds = round(last - begun, 1)
                    Events(self.record.path, piece.name).add("started", seconds=seconds)
            if self.left <= 0:
                return None
            if time.monotonic() - last > piece.limit:
                process.send_signal(signal.SIGABRT)  # faulthandler prints where its threads are
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
                return f"no sign for {piece.limit:g} s: it was ended"
        return f"its process ended with status {process.returncode}"

    def _environment(self) -> dict[str, str]:
        given = [path for path in [os.environ.get("PYTHONPATH", "")] if path]
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tools"), *given])
        hidden = {} if self.device == "cuda" else {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        return {
            **os.environ,
            "PYTHONPATH": paths,
            "PYTHONFAULTHANDLER": "1",
            "PYTHONUNBUFFERED": "1",
            **hidden,
        }


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
