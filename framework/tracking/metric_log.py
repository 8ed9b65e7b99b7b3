"""The numbers of a run in files: ``metrics.jsonl``, line by line, and ``result.json``."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from framework.runtime.errors import LocalError, UserError
from framework.runtime.files import unlocked, write_whole

logger = logging.getLogger(__name__)

_STEP = re.compile(rb'\{"step": (\d+)')  # every line begins so


class MetricLog:
    """A JSONL file that can be read as one run, however often it was interrupted.

    Every start writes a line ``{"environment": ..., "step": first}``, every step one line. Lines of steps that an
    interrupted run wrote past the checkpoint from which it now goes on are dropped, a torn last line too; those
    of starts stay. While the disk is full, lines wait in memory.

    Args:
        path: the file; its folder must exist.
        step: step to go on from; 0 for a new run.
        environment: see ``environment``.
        check: raises a ``LocalError`` if another process has the folder, and so does every write then.

    Raises:
        UserError: the file can't be opened, or holds a line of something else.
    """

    def __init__(
        self,
        path: Path,
        environment: Mapping[str, Any],
        step: int = 0,
        check: Callable[[], None] = unlocked,
    ) -> None:
        self.path, self._check = path, check
        self._waiting = b""
        try:
            _drop_steps(path, step)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise UserError(f"{path}: can't be written: {error.strerror}") from error
        self._append({"step": step, "environment": environment})

    def write(self, step: int, *, epoch: float, lr: float, losses: Mapping[str, float], **more: Any) -> None:
        """Append a step, counted from 0: unweighted losses by unit name, whatever else by keyword.

        Numbers that are not finite become ``null``, which every JSON reader accepts.
        """
        self._append({"step": step, "epoch": epoch, "lr": lr, "losses": losses, **more})

    def write_scores(self, step: int, *, epoch: float, scores: Mapping[str, float]) -> None:
        """Append accuracies in per cent, measured after ``step``."""
        self._append({"step": step, "epoch": epoch, "scores": scores})

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, entry: Mapping[str, Any]) -> None:
        warned = bool(self._waiting)
        self._waiting += _line(entry).encode()
        try:
            self._check()
            while self._waiting:  # a full disk may take the first part of a line
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except LocalError:
            raise
        except (OSError, UserError) as error:
            if not warned:
                reason = error.strerror if isinstance(error, OSError) else error
                logger.warning("%s: can't be written (%s); its lines wait", self.path, reason)


def _drop_steps(path: Path, step: int) -> None:
    """Cut a log off before ``step``, but for the lines that tell of starts. Long logs are not parsed for it."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        kept, cut = 0, False
        starts = []
        for place, line in enumerate(file, start=1):
            is_start, number = b'"environment"' in line, _STEP.match(line)
            if line.endswith(b"\n") and (number is None or not line.isascii() or line[-2:] != b"}\n"):
                raise UserError(f"{path}, line {place}: not a line of a log; mend it or take it out")
            past = number is not None and int(number[1]) >= step and not is_start
            cut = cut or past or not line.endswith(b"\n")
            if not cut:
                kept += len(line)
            elif is_start and line.endswith(b"\n"):
                starts.append(line)
        file.truncate(kept)
        file.seek(kept)
        file.write(b"".join(starts))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``MetricLog``; a last line that a crash cut short is left out.

    Raises:
        UserError: another line is none of a ``MetricLog``.
    """
    lines = path.read_bytes().split(b"\n")
    # What follows the last newline is torn or empty.
    return [read_entry(line, f"{path}, line {number}") for number, line in enumerate(lines[:-1], start=1)]


def read_entry(line: bytes, where: str) -> dict[str, Any]:
    """One line of a ``MetricLog``, which stands ``where``.

    Raises:
        UserError: it is none.
    """
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not a line of JSON") from error
    wanted = (
        {"step", "epoch"} if isinstance(entry, dict) and entry.keys() & {"losses", "scores"} else {"step"}
    )
    if not isinstance(entry, dict) or wanted - entry.keys():
        raise UserError(f"{where}: not a line of a log: must be an object with {', '.join(sorted(wanted))}")
    return entry


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write ``result.json`` whole or not at all."""
    write_whole(path, json.dumps(_finite(result), indent=2) + "\n")


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(_finite(entry), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
