"""A trace of some steps, for chrome://tracing, Perfetto or TensorBoard."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from framework.runtime.distributed import is_main
from framework.runtime.errors import UserError
from framework.runtime.files import unlocked

logger = logging.getLogger(__name__)
_HISTORY = 1_000_000  # allocations and frees that a snapshot tells of


class StepProfiler:
    """``torch.profiler`` over consecutive steps of rank 0; before and after them it does nothing.

    Leaves ``profile/steps-FIRST-LAST.json.gz`` in the run folder and, on a GPU, ``steps-FIRST-LAST.memory.pickle``, a
    snapshot of its memory for https://docs.pytorch.org/memory_viz. Steps that are not made, because an earlier start
    made them or the run is ended, are missing.

    Args:
        steps: to be traced.
        run_dir: folder of the run.
        device: where the training runs.
        paused: entered where tracing begins and where files are written, both of which take seconds.
        check: raises if another process has the run's folder.
    """

    def __init__(
        self,
        steps: range,
        run_dir: Path,
        device: torch.device,
        paused: Callable[[], AbstractContextManager[object]] = nullcontext,
        check: Callable[[], None] = unlocked,
    ) -> None:
        self._steps = steps if is_main() else range(0)
        self._folder, self._cuda = run_dir / "profile", device.type == "cuda"
        self._paused, self._check = paused, check
        self._made: list[int] = []
        self._profile: profile | None = None
        self._step: record_function | None = None

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._stop(write=kind is None)

    def begin(self, step: int) -> None:
        """Call before step ``step``; what was done since the call before belongs to the step before."""
        if step not in self._steps:
            self._stop()
            return
        if self._profile is None:
            self._start()
        self._end_step()
        self._made.append(step)
        self._step = record_function(f"step {step}")
        self._step.__enter__()

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        with self._paused():
            self._profile = profile(activities=activities, record_shapes=True)
            self._profile.start()
            if self._cuda:
                torch.cuda.memory._record_memory_history(max_entries=_HISTORY)

    def _end_step(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None

    def _stop(self, write: bool = True) -> None:
        if self._profile is None:
            return
        with self._paused():
            self._end_step()
            finished, self._profile = self._profile, None
            finished.stop()
            try:
                if write:
                    self._write(finished)
            finally:
                if self._cuda:
                    torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, finished: profile) -> None:
        self._check()
        name = f"steps-{self._made[0]:08d}-{self._made[-1]:08d}"
        try:
            self._folder.mkdir(exist_ok=True)
            finished.export_chrome_trace(str(self._folder / f"{name}.json.gz"))
            if self._cuda:
                torch.cuda.memory._dump_snapshot(str(self._folder / f"{name}.memory.pickle"))
        except OSError as error:  # a full disk must not end a run
            logger.warning("%s: no profile: %s", self._folder, error.strerror)


def steps_to_profile(asked: tuple[int, int] | None, start: int, stop: int) -> range:
    """The steps of ``logging.profile``, its first and last, in a run that makes steps ``start`` to ``stop - 1``.

    Raises:
        UserError: the run ends before.
    """
    if asked is None:
        return range(0)
    first, last = asked
    if first >= stop > start:
        raise UserError(
            f"logging.profile=[{first},{last}]: steps count from 0, and the run's last is {stop - 1}"
        )
    return range(first, last + 1)
