"""Runs that DeepSpeed's launcher starts, as users do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from framework.tracking.metric_log import read_log
from tests.support.marks import slow, soak
from tests.support.ports import free_port

ROOT = Path(__file__).resolve().parents[2]


def launch(*argv: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """The command line as users have it."""
    program = Path(sys.executable).with_name("deepspeed")
    places = ["--num_gpus", str(ranks), "--master_port", str(free_port())]
    command = [str(program), *places, "framework/train.py", *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def places(folder: Path) -> list[str]:
    return [f"run_dir={folder / 'run'}", f"data.path={folder / 'digits'}"]


@pytest.mark.slow
def test_the_launcher_starts_ranks_that_train_together(tmp_path: Path) -> None:
    short = ["engine=ddp", "network.name=resnet8", "train.max_steps=2", "evaluate.knn=false"]
    done = launch("recipes/quickstart.yaml", *places(tmp_path), *short, ranks=2)
    assert done.returncode == 0, done.stderr
    start, *steps = read_log(tmp_path / "run" / "metrics.jsonl")
    assert start["environment"]["world_size"] == 2
    assert [step["step"] for step in steps if "losses" in step] == [0, 1]
    assert (tmp_path / "run" / "backbone.safetensors").exists()


@pytest.mark.slow
def test_the_launcher_prints_an_error_once_and_fails(tmp_path: Path) -> None:
    done = launch("recipes/quickstart.yaml", *places(tmp_path), "method.windw=2", ranks=2)
    assert done.returncode != 0
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error:")]
    assert lines == [
        "error: command line: method.windw=2: unknown key for the method chosen; the nearest is method.window"
    ]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("recipe", "score", "least", "shorter"),
    [
        *slow([("quickstart", "knn_top1", 91, ["train.epochs=8"])]),
        *slow([("quickstart_mlaan", "test_top1", 95, ["train.epochs=6"])]),
        *soak([("quickstart", "knn_top1", 95, []), ("quickstart_mlaan", "test_top1", 97, [])]),
    ],
)
def test_the_quick_starts_learn(
    tmp_path: Path, recipe: str, score: str, least: float, shorter: list[str]
) -> None:
    done = launch(f"recipes/{recipe}.yaml", *places(tmp_path), *shorter)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result[score] >= least
    assert result["knn_top1"] > result["knn_top1_untrained"]
    assert "raw pixels" in done.stdout
