"""What a run tells of itself besides losses: norms, waiting for the loader, profiles, utilization."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from framework.config import loading
from framework.cost.utilization import Utilization
from framework.data.batch import Batch
from framework.data.splits import Splits
from framework.model import recipe_network
from framework.tracking.measuring import Throughput
from framework.tracking.metric_log import read_log
from framework.training.engine_choice import build_engine
from framework.training.loop import Loop
from framework.training.position import Position
from tests.support.marks import slow
from tests.support.pool import Pool
from tests.support.runs import ROOT, run, toy, weights

RECIPE = str(ROOT / "recipes" / "quickstart.yaml")
PoolOf = Callable[[int], Pool]
NUMBERS = ("logging.norms=true", "logging.every_steps=2", "checkpoint.every_steps=1", "checkpoint.keep=9")


def entries(folder: Path) -> list[dict[str, Any]]:
    return [entry for entry in read_log(folder / "run" / "metrics.jsonl") if "losses" in entry]


def norms_of_checkpoints(folder: Path, step: int) -> tuple[dict[str, float], dict[str, float]]:
    """Of the weights after ``step``, counted from 0, and of what it changed them by; segments as LoCo has them."""
    after, before = weights(folder, step + 1), weights(folder, step)
    names = [n for n in after if n.endswith((".weight", ".bias")) and n.startswith(("backbone.", "heads."))]
    units = {"layer3": [n for n in names if n.startswith(("backbone.layer3.", "heads.layer3."))]}
    units["layer2"] = [n for n in names if n not in units["layer3"]]

    def norms(tensor_of: Callable[[str], Any]) -> dict[str, float]:
        squares = {
            unit: sum(np.square(tensor_of(n).double().numpy()).sum() for n in own)
            for unit, own in units.items()
        }
        return {unit: float(np.sqrt(square)) for unit, square in squares.items()}

    return norms(lambda n: after[n]), norms(lambda n: after[n].double() - before[n].double())


STAGES = "deepspeed pipeline.stages=2"


@pytest.mark.parametrize(
    ("ranks", "engine"), [(1, "ddp"), *slow([(2, "ddp"), (2, "deepspeed"), (2, "fsdp"), (2, STAGES)])]
)
def test_a_run_writes_norms(tmp_path: Path, pool: PoolOf, ranks: int, engine: str) -> None:
    settings = f"engine={engine}".split()
    argv = [RECIPE, *toy(tmp_path, *settings, "data.workers=0", "train.max_steps=4", *NUMBERS)]
    assert set(pool(ranks).run(run, argv)) == {""}
    found = entries(tmp_path)
    assert [entry["step"] for entry in found] == [0, 2, 3]
    for entry in found[1:]:
        whole, update = norms_of_checkpoints(tmp_path, entry["step"])
        assert entry["weight_norms"] == pytest.approx(whole, rel=1e-6)
        assert entry["update_norms"] == pytest.approx(update, rel=1e-4)
        assert all(0 < value < 1e3 for value in entry["gradient_norms"].values())
    assert all(0 <= entry["loader_wait"] < 1 for entry in found)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert 0 < result["loader_wait"] < 1 and "mfu" not in result
    assert not (tmp_path / "run" / "profile").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "engine"), [(1, "ddp"), (2, "deepspeed")])
def test_some_steps_of_a_run_are_traced(tmp_path: Path, pool: PoolOf, ranks: int, engine: str) -> None:
    argv = [RECIPE, *toy(tmp_path, f"engine={engine}", "data.workers=0", "train.max_steps=4")]
    assert set(pool(ranks).run(run, [*argv, "logging.profile=[1,2]"])) == {""}
    [trace] = (tmp_path / "run" / "profile").iterdir()
    assert trace.name == "steps-00000001-00000002.json.gz"
    with gzip.open(trace) as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"step 1", "step 2", "aten::convolution_backward"} <= names
    assert not {"step 0", "step 3"} & names


class Clock:
    """A second until a batch is there, three for its step, and a thousand for scoring."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def speeds_by_clock(folder: Path) -> dict[str, Any]:
    """What a loop of two epochs says of its speed at the end, its log aside."""
    settings = (
        "train.epochs=2",
        "evaluate.every_epochs=1",
        "faults.nonfinite=skip",
    )  # each step is read at once
    recipe = loading.load([RECIPE, *toy(folder, "engine=ddp", "data.workers=0", *settings)])
    splits, clock = Splits.open(recipe), Clock()
    net = recipe_network(recipe, splits.num_classes)
    loader, engine = splits.train_loader(2), build_engine(recipe, net, splits.num_classes)
    batches = loader.steps

    def slow_batches(start: int, stop: int) -> Iterator[list[Batch]]:
        for batch in batches(start, stop):
            clock.now += 1
            yield batch

    def score() -> dict[str, float]:
        clock.now += 1000
        return {}

    def step_done(steps: int) -> None:
        clock.now += 3

    loader.steps = slow_batches  # type: ignore[method-assign]
    loop = Loop(recipe, engine, loader, Position(), score, utilization=Utilization(flops=1e9, peak=64e9))
    loop.speed = Throughput(clock=clock)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        loop.run(step_done)
    engine.close()
    return {key: loop.summary()[key] for key in ("images_per_second", "loader_wait", "mfu")}


@pytest.mark.slow
def test_speed_waiting_and_utilization_by_a_clock(tmp_path: Path, pool: PoolOf) -> None:
    """64 images of 1 GFLOP each in 4 seconds, one of which is the loader's, on a GPU that could do 64 GFLOP/s."""
    [summary] = pool(1).run(speeds_by_clock, tmp_path)
    assert summary == {"images_per_second": 16.0, "loader_wait": 0.25, "mfu": 0.25}
    first, *others = entries(tmp_path)
    assert (first["loader_wait"], first["mfu"]) == (0.0, 0.0)
    assert len(others) == 43 and all(entry["loader_wait"] == entry["mfu"] == 0.25 for entry in others)


@pytest.mark.slow
def test_what_is_to_be_profiled_must_be_there(tmp_path: Path, pool: PoolOf) -> None:
    """Steps behind the last one are missing; a run that goes on behind all of them has made them before."""
    argv = [RECIPE, *toy(tmp_path, "engine=ddp", "data.workers=0")]
    message = "logging.profile=[4,5]: steps count from 0, and the run's last is 1"
    assert pool(1).run(run, [*argv, "train.max_steps=2", "logging.profile=[4,5]"]) == [message]
    assert not (tmp_path / "run").exists()
    assert pool(1).run(run, [*argv, "train.max_steps=2", "logging.profile=[1,9]"]) == [""]
    assert pool(1).run(run, [*argv, "train.max_steps=3", "logging.profile=[0,0]"]) == [""]
    assert [f.name for f in (tmp_path / "run/profile").iterdir()] == ["steps-00000001-00000001.json.gz"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_skipped_step_has_no_norms(tmp_path: Path, pool: PoolOf, ranks: int) -> None:
    huge = ("optim.lr=1e35", "optim.warmup_epochs=0", "faults.nonfinite=skip")
    argv = [RECIPE, *toy(tmp_path, "data.workers=0", "train.max_steps=4", *huge, *NUMBERS)]
    assert set(pool(ranks).run(run, argv)) == {""}
    found = entries(tmp_path)
    assert {entry["skipped"] for entry in found} == {False, True}
    assert all(("gradient_norms" in entry) != entry["skipped"] for entry in found)
