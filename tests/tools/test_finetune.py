"""Fine-tuning: of a run that was trained in a pipeline, and stopped by a signal."""

from __future__ import annotations

import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from framework.config.recipe import Pipeline
from framework.evaluation.run_folder import Run
from framework.runtime.exit_status import EXIT_TRY_AGAIN
from tests.support.trained import ROOT

TOOL = ROOT / "tools" / "finetune.py"


@pytest.fixture
def folder(both_runs: tuple[Path, Path], tmp_path: Path) -> Path:
    """A finished run, to be written into."""
    return Path(shutil.copytree(both_runs[0], tmp_path / "run"))


def test_a_run_of_a_pipeline_is_tuned_on_any_ranks(folder: Path) -> None:
    run = Run.open(folder, ["engine=deepspeed", "pipeline.stages=2", "pipeline.micro_batches=4"])
    recipe = runpy.run_path(str(TOOL))["_recipe"](run, 0.5, False, ["engine=ddp"])
    assert recipe.pipeline == Pipeline() and recipe.engine == "ddp"
    assert recipe.train.batch_size > 64


@pytest.mark.slow
def test_a_signal_leaves_work_to_go_on_with(folder: Path) -> None:
    command = [sys.executable, str(TOOL), str(folder), "--labels", "1", "train.epochs=10000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log = folder / "finetune-1" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and "losses" in log.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == EXIT_TRY_AGAIN, errors
    assert list((folder / "finetune-1" / "checkpoints").glob("step-*"))
