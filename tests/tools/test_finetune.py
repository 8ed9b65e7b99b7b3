"""Fine-tuning: of a run that was trained in a pipeline, and stopped by a signal."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from framework.config.recipe import Pipeline
from framework.data.packing.digits import prepare_digits
from framework.data.packing.writer import write_shards
from framework.data.shards.index import ShardSet
from framework.evaluation.run_folder import Run
from framework.runtime.errors import UserError
from framework.runtime.exit_status import EXIT_TRY_AGAIN
from framework.training.fine_tuning import fine_tuning_recipe
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
    recipe = fine_tuning_recipe(run, 0.5, False, ["engine=ddp"])
    assert recipe.pipeline == Pipeline() and recipe.engine == "ddp"
    assert recipe.train.batch_size > 64


def test_the_images_are_those_of_the_overrides(folder: Path, tmp_path: Path) -> None:
    """Where the run's own are gone, and what depends on their number follows."""
    run = Run.open(folder, [f"data.path={tmp_path / 'gone'}", "data.prepare=none"])
    prepare_digits(tmp_path / "digits")
    few = ShardSet.open(tmp_path / "digits" / "train").take(np.arange(0, 1437, 5))
    images = ((f"{i}", few.read(i), "png", int(few.labels[i])) for i in range(len(few)))
    write_shards(images, tmp_path / "few" / "train", None)
    shutil.copytree(tmp_path / "digits" / "test", tmp_path / "few" / "test")
    recipe = fine_tuning_recipe(run, 0.5, False, [f"data.path={tmp_path / 'few'}"])
    half = len(few) / 2
    assert half / 3 - 5 < recipe.train.batch_size <= half / 3 + 5  # of every class a half, rounded
    assert recipe.optim.lr == pytest.approx(0.05 * recipe.train.batch_size / 256)
    assert recipe.data.path == str(tmp_path / "few")
    with pytest.raises(UserError, match="gone/train: no such folder"):
        fine_tuning_recipe(run, 0.5, False, [])
    assert not (folder / "finetune-0.5").exists(), "nothing is trained yet"


@pytest.mark.slow
def test_a_signal_leaves_work_to_go_on_with(folder: Path, tmp_path: Path) -> None:
    log = folder / "finetune-1" / "metrics.jsonl"
    with forked_tool(tmp_path, "finetune", folder, "--labels", "1", "train.epochs=10000") as tuning:
        until(lambda: not tuning.process.is_alive() or (log.exists() and "losses" in log.read_text()))
        tuning.signal(signal.SIGTERM)
        assert tuning.status() == EXIT_TRY_AGAIN, tuning.stderr
    assert list((folder / "finetune-1" / "checkpoints").glob("step-*"))
