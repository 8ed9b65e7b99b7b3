"""Fine-tuning: of a run that was trained in a pipeline, and stopped by a signal."""

from __future__ import annotations

import runpy
import shutil
import signal
from pathlib import Path

import pytest

from framework.config.recipe import Pipeline
from framework.evaluation.run_folder import Run
from framework.runtime.requests import EXIT_TRY_AGAIN
from tests.support.forked import forked_tool
from tests.support.trained import ROOT
from tests.support.waiting import until

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
def test_a_signal_leaves_work_to_go_on_with(folder: Path, tmp_path: Path) -> None:
    log = folder / "finetune-1" / "metrics.jsonl"
    with forked_tool(tmp_path, "finetune", folder, "--labels", "1", "train.epochs=10000") as tuning:
        until(lambda: not tuning.process.is_alive() or (log.exists() and "losses" in log.read_text()))
        tuning.signal(signal.SIGTERM)
        assert tuning.status() == EXIT_TRY_AGAIN, tuning.stderr
    assert list((folder / "finetune-1" / "checkpoints").glob("step-*"))
