"""The state of runs: read while a run writes, after it was interrupted, and when it is over."""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path

import pytest
from rich.console import Console

from framework.config import loading
from framework.runtime.errors import UserError
from framework.runtime.files import write_whole
from framework.tracking.metric_log import MetricLog, write_result
from framework.tracking.status import RunStatus, overview

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml"


def new_run(folder: Path) -> MetricLog:
    """A run of 25 epochs of 4 steps of 64 images each."""
    write_whole(folder / "recipe.yaml", loading.to_yaml(loading.load([str(RECIPE)])))
    return MetricLog(folder / "metrics.jsonl", {})


def write(log: MetricLog, steps: range, **more: object) -> None:
    for step in steps:
        losses = {"layer2": 4.0 - step / 100, "layer3": 3.5}
        numbers = {"images_per_second": 128.0, "skipped": False, **more}
        log.write(step, epoch=(step + 1) / 4, lr=0.1, losses=losses, **numbers)


def drawn(*runs: RunStatus) -> str:
    """What a terminal of 80 columns shows."""
    console = Console(file=io.StringIO(), width=80)
    console.print(overview(runs))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 80
    return text


def test_a_run_is_followed_through_restarts(tmp_path: Path) -> None:
    log = new_run(tmp_path)
    run = RunStatus(tmp_path)
    assert "epoch 0.0 of 25, step 0 of ?" in drawn(run) and "none yet" in drawn(run)
    write(log, range(20))
    drawn(run)
    assert run.steps == (20, 100) and run.per_second == 2.0 and run.state == "running"
    assert run.remaining == "0:00:40"
    assert run.losses == ["layer2 3.810", "layer3 3.500"]
    write(log, range(20, 22), skipped=True)
    log.close()
    log = MetricLog(tmp_path / "metrics.jsonl", {}, step=10)
    drawn(run)
    assert run.starts == 2 and run.skipped_steps == 0, "what was skipped past the checkpoint has not been"
    write(log, range(10, 12), skipped=True)
    log.close()
    log = MetricLog(tmp_path / "metrics.jsonl", {}, step=10)
    write(log, range(10, 40))  # by the next look the log is longer than before
    log.close()
    drawn(run)
    assert (run.starts, run.skipped_steps, run.last["step"]) == (3, 0, 39)
    log = MetricLog(tmp_path / "metrics.jsonl", {}, step=10)
    write(log, range(10, 12), skipped=True)
    lines = [line.strip() for line in drawn(run).splitlines()]
    assert lines == [
        f"{tmp_path.name}: running",
        "progress epoch 3.0 of 25, step 12 of 100, 2.00 steps/s, 0:00:44 to go",
        "losses   layer2 3.890  layer3 3.500",
        "saved    none",
        "restarts 3, skipped: 0 images, 2 steps",
    ]
    log.close()


def test_waiting_for_the_loader_is_shown(tmp_path: Path) -> None:
    write(new_run(tmp_path), range(4), loader_wait=0.37)
    assert "2.00 steps/s, 0:00:48 to go, 37% waiting for data" in " ".join(drawn(RunStatus(tmp_path)).split())


def test_losses_of_many_units_take_lines_of_their_own(tmp_path: Path) -> None:
    log = new_run(tmp_path)
    log.write(0, epoch=0.25, lr=0.1, losses={f"layer{i // 18}.{i}/window": i + 0.5 for i in range(54)})
    text = drawn(RunStatus(tmp_path), RunStatus(tmp_path))
    for i in range(0, 54, 7):  # 8 of 54
        assert text.count(f"layer{i // 18}.{i}/window {i}.500") == 2
    assert text.count("/window") == 16 and text.count("progress") == 2
    log.close()


def test_the_newest_whole_checkpoint_is_shown_with_what_was_skipped(tmp_path: Path) -> None:
    write(new_run(tmp_path), range(8))
    for step, broken in ((4, 1), (8, 3)):
        state = {"position": {"step": step, "broken": broken}}
        write_whole(tmp_path / f"checkpoints/step-{step:08d}/state.json", json.dumps(state))
    (tmp_path / "checkpoints" / "step-00000012").mkdir()
    assert "3 images, 0 steps" in drawn(RunStatus(tmp_path))
    assert "step 8, 0:00:0" in drawn(RunStatus(tmp_path))


def test_silence_and_the_end_are_told(tmp_path: Path) -> None:
    log = new_run(tmp_path)
    write(log, range(8))
    run = RunStatus(tmp_path)
    old = time.time() - 3600
    os.utime(tmp_path / "metrics.jsonl", (old, old))
    assert "silent for 1:00:0" in drawn(run)
    write_result(tmp_path / "result.json", {})
    assert "finished" in drawn(run)


@pytest.mark.parametrize("recipe", ["a: 1", "train: 5", "- train", "\0", "[1"])
def test_a_recipe_that_is_none_is_named(tmp_path: Path, recipe: str) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe)
    with pytest.raises(UserError, match=f"{tmp_path}: not the folder of a run: recipe.yaml"):
        RunStatus(tmp_path)


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: not the folder of a run: recipe.yaml can't be read"):
        RunStatus(tmp_path / "nowhere")
