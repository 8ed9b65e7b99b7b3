"""What a run measures: the JSONL log, images per second, memory, the environment, ``result.json``."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from framework.runtime.errors import UserError
from framework.runtime.files import write_whole

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
_STEP = re.compile(rb'\{"step": (\d+)')  # every line begins so
PACKAGES = ("stagewise", "torch", "torchvision", "deepspeed", "timm", "numpy", "scikit-learn", "webdataset")


class MetricLog:
    """A JSONL file that can be read as one run, however often it was interrupted.

    Every start writes a line ``{"environment": ..., "step": first}``, every step one line. Lines of steps that an
    interrupted run wrote past the checkpoint from which it now goes on are dropped, a torn last line too; those
    of starts stay. While the disk is full, lines wait in memory.

    Args:
        path: the file; its folder must exist.
        step: step to go on from; 0 for a new run.
        environment: see ``environment``.

    Raises:
        UserError: the file can't be opened.
    """

    def __init__(self, path: Path, environment: Mapping[str, Any], step: int = 0) -> None:
        self.path = path
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
            while self._waiting:  # a full disk may take the first part of a line
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not warned:
                logger.warning("%s: can't be written (%s); its lines wait", self.path, error.strerror)


def _drop_steps(path: Path, step: int) -> None:
    """Cut a log off before ``step``, but for the lines that tell of starts. Long logs are not parsed for it."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        kept, cut = 0, False
        starts = []
        for line in file:
            is_start, number = b'"environment"' in line, _STEP.match(line)
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
        UserError: another line is no JSON.
    """
    lines = path.read_text().split("\n")
    entries = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is torn or empty
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not a line of JSON") from error
    return entries


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write ``result.json`` whole or not at all."""
    write_whole(path, json.dumps(_finite(result), indent=2) + "\n")


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(_finite(entry), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Throughput:
    """Images per second: over the last steps, and over all but the first.

    The first step, which pays for compilation, caches and the filling of the loader's queues, is left out.
    """

    def __init__(self, window: int = 20, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._recent: deque[tuple[float, int]] = deque(maxlen=window + 1)  # time, images up to then
        self._first: tuple[float, int] | None = None

    def step(self, images: int) -> float:
        """Note that ``images`` more are done; the rate over the last ``window`` steps, 0 after the first."""
        seen = self._recent[-1][1] if self._recent else 0
        self._recent.append((self._clock(), seen + images))
        self._first = self._first or self._recent[0]
        return _rate(self._recent[0], self._recent[-1])

    @property
    def mean(self) -> float:
        """Rate from the end of the first step to the end of the last; 0 with fewer than two."""
        return _rate(self._first, self._recent[-1]) if self._first else 0.0


def _rate(start: tuple[float, int], end: tuple[float, int]) -> float:
    return (end[1] - start[1]) / (end[0] - start[0]) if end[0] > start[0] else 0.0


def environment(world_size: int, device: torch.device) -> dict[str, Any]:
    """What a number needs beside it to be compared: versions, commit, devices, ranks."""
    return {
        "versions": versions(),
        "commit": commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "world_size": world_size,
    }


def _processor() -> str:
    """The CPU's name; Python knows only its architecture on Linux."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Version of Python and of every package that can move a number."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}


def commit(root: Path = ROOT) -> str | None:
    """Commit of the checkout at ``root``, "-dirty" if edited; ``None`` if ``root`` is not one."""
    try:
        top = _git(root, "rev-parse", "--show-toplevel")
        if Path(top).resolve() != root:  # installed below somebody else's repository
            return None
        return _git(root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory so far: the tensors' on a GPU, the resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes on macOS, KiB on Linux
