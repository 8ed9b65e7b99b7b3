"""Checkpoints written beside the training."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from framework.checkpoints.folder import partial_folder
from framework.checkpoints.retention import Keep
from framework.checkpoints.run_checkpoints import checkpoint_folder, write_checkpoint
from framework.checkpoints.snapshot import take_snapshot
from framework.engines import Engine
from framework.runtime.distributed import gather_text, is_main, rank, same_outcome
from framework.runtime.errors import LocalError, UserError
from framework.runtime.files import unlocked

logger = logging.getLogger(__name__)

# Seconds without news of other ranks' files, after which a run that ends with an error ends without that checkpoint.
GRACE = 20.0


class Saver:
    """Writes one checkpoint at a time, in a thread of each rank that has a share of it.

    Writing and hashing leave Python's lock alone. Training waits while states are copied to the ranks' memory, and for
    the checkpoint before if that is not on the disk yet. One that can't be written is a warning until ``wait``: the
    disk may have room again next time.

    Args:
        run_dir: folder of the run.
        keep: which checkpoints stay.
        check: raises a ``LocalError`` if another process has the folder.
    """

    def __init__(self, run_dir: Path, keep: Keep, check: Callable[[], None] = unlocked) -> None:
        self._run_dir, self._keep, self._check = run_dir, keep, check
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._shares = 0  # of what is being written
        self._partial = run_dir
        self._patience = math.inf
        self._failure: UserError | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        if kind is not None:  # other ranks may be gone, or elsewhere
            self._shares, self._patience = min(self._shares, 1), GRACE
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
        self._shares, self._patience = snapshot.share.count, math.inf
        self._partial = partial_folder(checkpoint_folder(self._run_dir, step), snapshot.token)
        if snapshot.share.number is not None:
            self._writing = self._thread.submit(
                write_checkpoint, self._run_dir, snapshot, self._keep, self._check, lambda: self._patience
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
        """Wait for this rank's thread; collective where several ranks write."""
        shares, self._shares = self._shares, 0
        elsewhere = self._failed_elsewhere() if shares > 1 else None
        if elsewhere is not None:
            self._patience = 0.0
        writing, self._writing = self._writing, None
        if shares or writing is not None:
            self._failure = elsewhere
        if writing is None:
            return
        try:
            writing.result()
        except UserError as error:
            if isinstance(error, LocalError):
                raise
            self._failure = elsewhere or error
        if self._failure is not None and is_main():
            shutil.rmtree(self._partial, ignore_errors=True)
        if self._failure is not None and (is_main() or shares == 1):  # else rank 0 says it
            logger.warning("%s; training goes on", self._failure)

    def _failed_elsewhere(self) -> UserError | None:
        """The first failure of a rank but 0, whose thread may be waiting for the file."""
        text = ""
        if self._writing is not None and not is_main():
            try:
                self._writing.result()
            except UserError as error:
                text = json.dumps([f"rank {rank()}: {error}", error.transient])
        for found in gather_text(text):
            if found:
                message, transient = json.loads(found)
                return UserError.as_transient(message) if transient else UserError(message)
        return None


def save_checkpoint(
    run_dir: Path, engine: Engine, step: int, state: Mapping[str, Any], keep: Keep | None = None
) -> Path:
    """A checkpoint that is on the disk when this returns; all ranks must call it. Arguments as of ``Saver``.

    Raises:
        UserError: on every rank, if a weight is not finite, or it can't be written.
    """
    with Saver(run_dir, keep or Keep()) as saver:
        saver.save(engine, step, state)
        saver.wait()
    return checkpoint_folder(run_dir, step)
