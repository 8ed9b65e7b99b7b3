"""The whole way from a recipe to a run folder, in one process and on ranks; resuming; errors that users meet."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from framework.checkpoints.folder import read_files, write_files
from framework.config import loading
from framework.data.packing.digits import prepare_digits
from framework.data.packing.writer import write_shards
from framework.data.shards.index import ShardSet
from framework.data.splits import Splits
from framework.model import recipe_network
from framework.tracking.measuring import Throughput
from framework.tracking.metric_log import read_log
from framework.training.engine_choice import build_engine
from framework.training.loop import Loop
from framework.training.position import Position
from tests.support.marks import slow
from tests.support.pool import Pool
from tests.support.runs import run, weights

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "quickstart.yaml"
SMALL = ["network.name=resnet8", "data.image_size=8", "train.batch_size=64", "evaluate.knn=false"]
PoolOf = Callable[[int], Pool]


def arguments(folder: Path, *overrides: str, recipe: Path = RECIPE) -> list[str]:
    """Command line of a small run in ``folder``."""
    return [str(recipe), f"data.path={folder / 'digits'}", f"run_dir={folder / 'run'}", *SMALL, *overrides]


def steps(log: Path) -> list[dict[str, float]]:
    """The losses of every step."""
    return [entry["losses"] for entry in read_log(log) if "losses" in entry]


def test_a_run_leaves_everything(tmp_path: Path, pool: PoolOf) -> None:
    argv = arguments(tmp_path, "train.max_steps=3", "evaluate.knn=true")
    assert pool(1).run(run, argv) == [""]
    folder = tmp_path / "run"
    result = json.loads((folder / "result.json").read_text())
    assert result["method"] == "loco" and result["steps"] == 3
    assert {"knn_top1", "linear_top1", "images_per_second", "peak_memory_bytes", "versions"} <= set(result)
    assert 98 < result["knn_top1_pixels"] < 99
    for picture in ("loss_curves.png", "neighbors.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    with safe_open(folder / "backbone.safetensors", "pt") as file:
        about = json.loads(file.metadata()["stagewise"])
    assert about["network"] == "resnet8" and about["views"]["mean"] == [0.5, 0.5, 0.5]
    again = loading.load([str(folder / "recipe.yaml")])
    assert again == loading.load(argv)
    backbone = timm.create_model(
        "resnet8", num_classes=0, checkpoint_path=str(folder / "backbone.safetensors")
    )
    model = load_file(folder / "checkpoints" / "step-00000003" / "model.safetensors")
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, model[f"backbone.{name}"]), name


@pytest.mark.parametrize(
    ("engine", "ranks"), [("deepspeed", 2), *slow([("deepspeed", 1), ("ddp", 2), ("fsdp", 2)])]
)
def test_a_resumed_run_is_bitwise_that_of_an_undisturbed_one(
    tmp_path: Path, pool: PoolOf, engine: str, ranks: int
) -> None:
    common = [f"engine={engine}", "train.epochs=1", "optim.warmup_epochs=0.2", "checkpoint.every_steps=2"]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert set(pool(ranks).run(run, arguments(straight, *common, "train.max_steps=5"))) == {""}
    assert set(pool(ranks).run(run, arguments(broken, *common, "train.max_steps=3"))) == {""}
    assert set(pool(ranks).run(run, arguments(broken, *common, "train.max_steps=5"))) == {""}
    ours, theirs = (weights(folder, 5) for folder in (broken, straight))
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert torch.equal(ours[key], theirs[key]), key
    assert steps(broken / "run" / "metrics.jsonl") == steps(straight / "run" / "metrics.jsonl")


@pytest.mark.slow
def test_a_run_moves_between_engines_and_numbers_of_ranks(tmp_path: Path, pool: PoolOf) -> None:
    """The numbers stay those of one process, to float32's rounding."""
    common = ["train.epochs=1", "optim.warmup_epochs=0.2", "network.sync_bn=true"]
    assert pool(1).run(run, arguments(tmp_path / "one", *common, "train.max_steps=6")) == [""]
    moving = tmp_path / "moving"
    for ranks, engine, last in [(2, "deepspeed", 2), (4, "fsdp", 4), (1, "ddp", 6)]:
        argv = arguments(moving, *common, f"engine={engine}", f"train.max_steps={last}")
        assert set(pool(ranks).run(run, argv)) == {""}
    ours, theirs = (steps(f / "run" / "metrics.jsonl") for f in (moving, tmp_path / "one"))
    for a, b in zip(ours, theirs, strict=True):
        for unit in b:
            assert a[unit] == pytest.approx(b[unit], rel=1e-4), unit


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, pool: PoolOf) -> None:
    good = ["train.max_steps=2", "checkpoint.every_steps=1", "optim.name=lars"]
    assert pool(1).run(run, arguments(tmp_path, *good)) == [""]
    (message,) = pool(1).run(run, arguments(tmp_path, "train.max_steps=9", "optim.lr=1e30"))
    assert "optimizer is LARS, and optim.name asks for SGD" in message
    (message,) = pool(1).run(
        run, arguments(tmp_path, *good[2:], "train.max_steps=9", "optim.lr=1e35", "optim.warmup_epochs=0")
    )
    assert (
        message.startswith("the loss of unit layer")
        and "at step 3" in message
        and "optim.lr=1e+35" in message
    )
    kept = sorted(f.name for f in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000001", "step-00000002"]


@pytest.mark.slow
def test_repeating_a_finished_command_keeps_what_tells_of_its_steps(tmp_path: Path, pool: PoolOf) -> None:
    """With the same settings and with others; also for runs of versions whose checkpoints held no times."""
    argv = arguments(tmp_path, "engine=ddp", "train.max_steps=4")
    assert pool(1).run(run, argv) == [""]
    folder = tmp_path / "run"
    result, recipe, log = (folder / n for n in ("result.json", "recipe.yaml", "metrics.jsonl"))
    made, settings, numbers = json.loads(result.read_text()), recipe.read_text(), log.read_text()
    assert made["images_per_second"] > 0
    scores = ["evaluate.knn=true", "evaluate.linear=false"]
    for overrides in ([], ["optim.lr=0.125", "train.max_steps=3", *scores]):
        assert pool(1).run(run, [*argv, *overrides]) == [""]
        again = json.loads(result.read_text())
        assert {key: value for key, value in again.items() if "knn" not in key} == made
        assert ("knn_top1" in again) == bool(overrides)
        assert (recipe.read_text(), log.read_text()) == (settings, numbers)
    for checkpoint in (folder / "checkpoints").iterdir():
        state = json.loads((checkpoint / "state.json").read_text())
        for key in ("images", "seconds", "peak_memory_bytes"):
            del state["position"][key]
        _, model, optimizer = read_files(checkpoint)
        write_files(checkpoint, model, optimizer, state)
    assert pool(1).run(run, argv) == [""]
    assert json.loads(result.read_text()) == made
    # A run that was killed while it was scored, and one that goes on after all.
    result.unlink()
    assert pool(1).run(run, [*argv, "train.max_steps=6", "optim.lr=0.125"]) == [""]
    result.unlink()
    assert pool(1).run(run, [*argv, "train.max_steps=6", "optim.lr=0.125"]) == [""]
    on = json.loads(result.read_text())
    assert on["steps"] == 6 and on["images_per_second"] > 0 and "lr: 0.125" in recipe.read_text()


class Clock:
    """A second a step; scoring takes a thousand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def speed_and_memory_with_scores(folder: Path) -> tuple[float, int, int]:
    """What a loop says of both, and the memory that was there before, where each scoring takes 400 MB."""
    recipe = loading.load(
        arguments(folder, "engine=ddp", "train.epochs=2", "optim.warmup_epochs=1", "evaluate.every_epochs=1")
    )
    splits = Splits.open(recipe)
    net = recipe_network(recipe, splits.num_classes)
    clock = Clock()

    def score() -> dict[str, float]:
        torch.ones(10**8).sum()
        clock.now += 1000
        return {}

    loop = Loop(
        recipe, build_engine(recipe, net, splits.num_classes), splits.train_loader(2), Position(), score
    )
    loop.speed = Throughput(clock=clock)

    def tick(steps: int) -> None:
        clock.now += 1

    loop.memory.step()
    before = loop.memory.bytes
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        loop.run(tick)
    summary = loop.summary()
    return summary["images_per_second"], summary["peak_memory_bytes"], before


@pytest.mark.slow
def test_speed_and_memory_are_those_of_training_alone(tmp_path: Path, pool: PoolOf) -> None:
    ((speed, peak, before),) = pool(1).run(speed_and_memory_with_scores, tmp_path)
    assert speed == 64  # images of a step
    assert peak - before < 2 * 10**8


def test_images_without_labels_are_trained_on_and_not_scored(tmp_path: Path, pool: PoolOf) -> None:
    """As those of STL-10, whose test images have labels."""
    prepare_digits(tmp_path / "data")
    labeled = ShardSet.open(tmp_path / "data" / "train")
    images = ((f"{i}", labeled.read(i), "png", None) for i in range(len(labeled)))
    write_shards(images, tmp_path / "data" / "unlabeled", None)
    data = ("data.prepare=none", f"data.path={tmp_path / 'data'}", "data.train=unlabeled")
    short = ("train.max_steps=2", "evaluate.knn=true", "evaluate.every_epochs=1")
    assert pool(1).run(run, arguments(tmp_path, *data, *short)) == [""]
    assert not [key for key in json.loads((tmp_path / "run" / "result.json").read_text()) if "top1" in key]
    assert (tmp_path / "run" / "backbone.safetensors").exists()
    write_shards([("0", labeled.read(0), "png", None)], tmp_path / "data" / "one", None)  # fewer than ranks
    argv = arguments(tmp_path / "two", *data, *short, "data.test=one")
    assert pool(2).run(run, argv) == ["", ""]


def test_a_run_goes_on_with_as_many_images_as_before_only(tmp_path: Path, pool: PoolOf) -> None:
    assert pool(1).run(run, arguments(tmp_path, "train.max_steps=2")) == [""]
    (message,) = pool(1).run(run, arguments(tmp_path, "train.max_steps=4", "data.fraction=0.5"))
    assert "step-00000002: an epoch of its images had 22 steps, and of those in data.path=" in message
    assert "it has 11: set data.path, data.train and data.fraction as before" in message


def test_the_folder_of_a_run_of_an_earlier_version_goes_on(tmp_path: Path, pool: PoolOf) -> None:
    """By the recipe that lies in it, whose keys may have old names."""
    assert pool(1).run(run, arguments(tmp_path, "train.max_steps=2")) == [""]
    folder = tmp_path / "run"
    names = {"prepare": "source", "fraction": "share", "neighbors": "neighbours"}
    names |= {"center": "centre", "grayscale": "greyscale"}
    text = (folder / "recipe.yaml").read_text()
    for new, old in names.items():
        assert text.count(f" {new}: ") == 1
        text = text.replace(f" {new}: ", f" {old}: ")
    (folder / "recipe.yaml").write_text(text)
    assert pool(1).run(run, [str(folder / "recipe.yaml"), "train.max_steps=4"]) == [""]
    assert len(steps(folder / "metrics.jsonl")) == 4
    assert loading.load([str(folder / "recipe.yaml")]) == loading.load(
        arguments(tmp_path, "train.max_steps=4")
    )


BAD = [
    (["network.cut=block", "method.window=7"], "method.window=7: the network has 3 segments, so 1 to 3"),
    (["network.name=resnet9"], "network.name=resnet9: no such network"),
    (["network.args.zero_int=true"], "network.args"),
    (["data.path={tmp}/nowhere", "data.prepare=none"], "{tmp}/nowhere/train: no such folder"),
    (["evaluate.knn=true", "evaluate.neighbors=1438"], "evaluate.neighbors=1438: must be at most 1437"),
    (
        ["evaluate.knn=true", "evaluate.neighbors=20", "evaluate.every_epochs=1", "evaluate.images=19"],
        "evaluate.neighbors=20: must be at most 19",
    ),
    (["data.num_classes=5"], "data.num_classes=5: {tmp}/digits/train has labels up to 9, so at least 10"),
    (["train.batch_size=65", "train.accumulation=2"], "batch_size=65"),
    (
        [
            "train.accumulation=32",
            *(f"method.head.{key}" for key in ("objective=barlow", "proj_hidden=16", "dim=8")),
        ],
        "unit layer2 compares images with each other and needs 3 or more in a micro-batch of all ranks, not 2",
    ),
    (["train.batch_size=4096"], "holds 1437 samples, fewer than batch_size=4096"),
    (["zero_stage=3"], "zero_stage=3: must be 0, 1 or 2; ZeRO-3 gathers a weight for each forward and again"),
    (["deepspeed.zero_optimization.stage=2"], "deepspeed.zero_optimization.stage: the recipe decides this"),
    (["deepspeed.fp16.enabled=true"], "deepspeed.fp16: the recipe decides this; set train.precision"),
    (["resume={tmp}/none"], "{tmp}/none: manifest.json can't be read"),
    (["optim.nesterov=true", "optim.name=lars"], "optim.nesterov=true: only sgd has it"),
    (["optim.learning_rate=1"], "optim.learning_rate=1: unknown key; the nearest is"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD)
@pytest.mark.parametrize("ranks", [1, 2])
def test_bad_input_is_named_and_damages_nothing(
    tmp_path: Path, pool: PoolOf, overrides: list[str], message: str, ranks: int
) -> None:
    filled = [o.format(tmp=tmp_path) for o in overrides]
    messages = pool(ranks).run(run, arguments(tmp_path, *filled))
    assert len(set(messages)) == 1, messages
    assert message.format(tmp=tmp_path) in messages[0]
    assert "\n" not in messages[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "images"), [("infonce", 2), ("barlow", 4), ("vicreg", 2)])
def test_few_images_a_rank_are_enough_where_ranks_contrast_together(
    tmp_path: Path, pool: PoolOf, objective: str, images: int
) -> None:
    small = ("method.head.proj_hidden=16", "method.head.dim=8", "train.max_steps=3")
    argv = arguments(tmp_path, f"method.head.objective={objective}", *small, f"train.batch_size={images}")
    assert set(pool(2).run(run, argv)) == {""}
    losses = steps(tmp_path / "run" / "metrics.jsonl")
    assert all(value is not None and value > 0 for step in losses for value in step.values())
    assert len({step["layer3"] for step in losses}) == 3


def test_resume_never_does_not_mix_two_runs(tmp_path: Path, pool: PoolOf) -> None:
    assert pool(1).run(run, arguments(tmp_path, "train.max_steps=1")) == [""]
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    (message,) = pool(1).run(run, arguments(tmp_path, "train.max_steps=1", "resume=never"))
    assert "already holds step-00000001" in message
    (message,) = pool(1).run(run, arguments(tmp_path, "network.name=resnet14"))
    assert "a checkpoint of another network: backbone.layer1.1" in message
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_run_keeps_its_options_when_defaults_have_changed(tmp_path: Path, pool: PoolOf) -> None:
    """Its recorded recipe holds them all; under another command line, a line says which to set."""
    mlaan = ROOT / "recipes" / "quickstart_mlaan.yaml"
    begin = arguments(tmp_path, "method.lam_on=cascaded", "engine=ddp", recipe=mlaan)
    assert pool(1).run(run, [*begin, "method.lam_weights=two_copies", "train.max_steps=1"]) == [""]
    (message,) = pool(1).run(run, [*begin, "train.max_steps=2"])
    assert message.endswith("its run had method.lam_weights=two_copies")
    recorded = tmp_path / "run" / "recipe.yaml"
    assert pool(1).run(run, [str(recorded), "train.max_steps=2"]) == [""]
    assert len(steps(tmp_path / "run" / "metrics.jsonl")) == 2
    older = tmp_path / "older.yaml"
    older.write_text(recorded.read_text().replace("  lam_weights: two_copies\n", ""))
    (message,) = pool(1).run(run, [str(older), "train.max_steps=3"])
    assert message.endswith("its run had method.lam_weights=two_copies")


def test_a_run_resumes_without_the_weights_that_it_began_with(tmp_path: Path, pool: PoolOf) -> None:
    """They may be gone; its own checkpoint is whole. A run that begins needs them."""
    begin = tmp_path / "begin.pth"
    torch.save(timm.create_model("resnet8", num_classes=0).state_dict(), begin)
    argv = arguments(tmp_path, f"network.args.checkpoint_path={begin}")
    assert pool(1).run(run, [*argv, "train.max_steps=1"]) == [""]
    begin.unlink()
    assert pool(1).run(run, [*argv, "train.max_steps=2"]) == [""]
    assert len(steps(tmp_path / "run" / "metrics.jsonl")) == 2
    [error] = pool(1).run(run, [*argv, f"run_dir={tmp_path / 'other'}"])
    assert error == f"network.args.checkpoint_path={begin}: no such file"


def test_one_value_for_a_batchnorm_is_told(tmp_path: Path, pool: PoolOf) -> None:
    """One image on maps of one pixel."""
    argv = arguments(tmp_path, "method.name=dgl", "method.head.kind=mlp", "train.accumulation=64")
    [error] = pool(1).run(run, argv)
    assert "a BatchNorm gets one value per channel" in error and error.startswith(
        "train.batch_size=64: too small"
    )
