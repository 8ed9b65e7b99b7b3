"""TensorBoard's and Weights & Biases' files hold what the log holds; one that fails is left out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from framework.config import loading
from framework.config.recipe import Recipe
from framework.runtime.errors import UserError
from framework.tracking.metric_log import MetricLog, read_log
from framework.tracking.trackers import Logs, open_trackers

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml"


def recipe(folder: Path, *overrides: str) -> Recipe:
    return loading.load([str(RECIPE), f"run_dir={folder}", *overrides])


def write(folder: Path, steps: range, *overrides: str, start: int = 0) -> None:
    """One start of a run: its steps, logged as the recipe says."""
    of = recipe(folder, *overrides)
    log = MetricLog(folder / "metrics.jsonl", {}, start)
    with Logs(log, open_trackers(of, start), of.logging.every_steps, last=9) as logs:
        for step in steps:
            logs.write(step, epoch=step / 4, lr=0.1, losses={"layer2": 2.0**-step}, skipped=False)


def test_tensorboard_has_every_step_once_however_often_a_run_starts(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write(tmp_path, range(6), "logging.tensorboard=true")
    write(tmp_path, range(4, 9), "logging.tensorboard=true", start=4)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {e.step: e.value for e in events.Scalars("losses/layer2")} == {s: 2.0**-s for s in range(9)}
    assert {"lr", "epoch", "skipped"} <= set(events.Tags()["scalars"])


@pytest.mark.slow
def test_weights_and_biases_keeps_one_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    for start in (0, 3):
        write(tmp_path, range(start, start + 3), "logging.wandb=offline", start=start)
    wandb.teardown()  # as a process that ends does: the files are written behind its back
    name = (tmp_path / "wandb-id.txt").read_text()
    files = list(tmp_path.glob(f"wandb/offline-run-*/run-{name}.wandb"))
    assert files and all(b"losses/layer2" in file.read_bytes() for file in files)


def test_entries_come_as_often_as_asked(tmp_path: Path) -> None:
    write(tmp_path, range(10), "logging.every_steps=4")
    assert [e["step"] for e in read_log(tmp_path / "metrics.jsonl") if "losses" in e] == [0, 4, 8, 9]


def test_what_can_not_be_had_stops_a_run_only_at_its_beginning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").touch()  # where its folder should be
    with pytest.raises(UserError, match="tensorboard: can't be written: File exists"):
        write(tmp_path, range(3), "logging.tensorboard=true")
    write(tmp_path, range(3, 5), "logging.tensorboard=true", start=3)
    assert [e["step"] for e in read_log(tmp_path / "metrics.jsonl") if "losses" in e] == [3, 4]
    (warning,) = caplog.messages
    assert warning.startswith("left out from step 3 on: ") and "File exists" in warning


class Failing:
    """Takes two steps."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.closed = False

    def write(self, step: int, numbers: Mapping[str, Any]) -> None:
        if step == 2:
            raise ConnectionError("no route to host")
        self.taken.append(step)

    def close(self) -> None:
        self.closed = True


def test_a_tracker_that_fails_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    failing = Failing()
    with Logs(MetricLog(tmp_path / "m.jsonl", {}), [failing], every=1, last=9) as logs:
        for step in range(5):
            logs.write(step, epoch=0.0, lr=0.1, losses={})
    assert failing.taken == [0, 1]
    assert len(read_log(tmp_path / "m.jsonl")) == 6
    assert [r.getMessage() for r in caplog.records] == [
        "Failing is left out from step 2 on: no route to host"
    ]
