"""Checkpoints written beside the training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from framework.checkpoints.retention import Keep
from framework.checkpoints.run_checkpoints import write_checkpoint
from framework.checkpoints.snapshot import take_snapshot
from framework.engines import Engine
from framework.runtime.distributed import is_main, same_outcome
from framework.runtime.errors import LocalError, UserError
from framework.runtime.files import unlocked

logger = logging.getLogger(__name__)


class Saver:
    """Writes one checkpoint at a time, in a thread of rank 0; writing and hashing leave Python's lock alone.

    Training waits while states are copied to rank 0's memory, and for the checkpoint before if that is not on
    the disk yet. One that can't be written is a warning until ``wait``: the disk may have room again next time.

    Args:
        run_dir: folder of the run.
        keep: which checkpoints stay.
        check: raises a ``LocalError`` if another process has the folder.
    """

    def __init__(self, run_dir: Path, keep: Keep, check: Callable[[], None] = unlocked) -> None:
        self._run_dir, self._keep, self._check = run_dir, keep, check
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Path] | None = None
        self._failure: UserError | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *exception: object) -> None:
        self._finish()  # whatever happened, the last one gets written
        self._thread.shutdown()

    def save(self, engine: Engine, step: int, state: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint; all ranks must call it. Arguments as ``take_snapshot``.

        Raises:
            UserError: on every rank, if a weight is not finite.
            LocalError: by ``check`` for the checkpoint before.
        """
        self._finish()
        snapshot = take_snapshot(engine, step, state)
        if is_main():
            self._writing = self._thread.submit(
                write_checkpoint, self._run_dir, snapshot, self._keep, self._check
            )

    def wait(self) -> None:
        """Until the last checkpoint is on the disk; all ranks must call it.

        Raises:
            UserError: on every rank, if it could not be written.
        """
        self._finish()
        with same_outcome():
            if self._failure is not None:
                raise self._failure

    def _finish(self) -> None:
        if self._writing is None:
            return
        try:
            self._writing.result()
            self._failure = None
        except LocalError:
            self._writing = None
            raise
        except UserError as error:
            logger.warning("%s; training goes on", error)
            self._failure = error
        self._writing = None
