"""Whole runs with mixed images, RandAugment, smoothed labels and averaged weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from framework.checkpoints.folder import read_weights
from framework.config import loading
from framework.evaluation.run_folder import Run
from framework.runtime.errors import UserError
from tests.support.marks import slow
from tests.support.pool import Pool
from tests.support.runs import assert_same_run, losses, run

PoolOf = Callable[[int], Pool]
RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SMALL = [
    "network.name=resnet8",
    "method.name=dgl",
    "data.workers=0",
    "train.batch_size=48",
    "evaluate.linear=false",
]
ALL = [
    "mixing={mixup:0.8,cutmix:1.0,mode:pair}",
    "views.rand_augment=rand-m9-mstd0.5-inc1",
    "train={label_smoothing:0.1,ema:0.9}",
]


def arguments(folder: Path, *overrides: str) -> list[str]:
    """Command line of a small run in ``folder / "run"``."""
    where = [f"data.path={folder.parent / 'digits'}", f"run_dir={folder / 'run'}"]
    return [str(RECIPES / "quickstart_mlaan.yaml"), *where, *SMALL, *overrides]


def result(folder: Path) -> dict[str, float]:
    return json.loads((folder / "run" / "result.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "ranks"), [("deepspeed", 2), ("fsdp", 2)])
def test_a_resumed_run_is_bitwise_that_of_an_undisturbed_one(
    tmp_path: Path, pool: PoolOf, engine: str, ranks: int
) -> None:
    common = [
        *ALL,
        f"engine={engine}",
        "network.sync_bn=true",
        "checkpoint.every_steps=2",
        "evaluate.knn=false",
    ]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert set(pool(ranks).run(run, arguments(straight, *common, "train.max_steps=5"))) == {""}
    for steps in (3, 5):
        assert set(pool(ranks).run(run, arguments(broken, *common, f"train.max_steps={steps}"))) == {""}
    assert_same_run(broken, straight, 5)
    assert any(name.startswith("average.") for name in read_weights(_checkpoint(straight, 5)))
    exported = load_file(straight / "run" / "backbone.safetensors")
    for name, value in Run.open(straight / "run").backbone().state_dict().items():
        assert torch.equal(value, exported[name]), name


@pytest.mark.slow
def test_ranks_micro_batches_and_stages_make_the_run_of_one_process(tmp_path: Path, pool: PoolOf) -> None:
    common = [*ALL, "network.sync_bn=true", "train.max_steps=6", "train.precision=fp32"]
    assert pool(1).run(run, arguments(tmp_path / "one", *common)) == [""]
    stages = ["pipeline.stages=2", "zero_stage=0"]
    for name, ranks, more in (("two", 2, ["engine=fsdp"]), ("stages", 2, stages)):
        assert set(pool(ranks).run(run, arguments(tmp_path / name, *common, *more))) == {""}
        for ours, theirs in zip(losses(tmp_path / name), losses(tmp_path / "one"), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
        ours, theirs = (read_weights(_checkpoint(tmp_path / n, 6)) for n in (name, "one"))
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-4)
        for key in ("knn_top1", "test_top1"):
            assert result(tmp_path / name)[key] == pytest.approx(result(tmp_path / "one")[key], abs=1.0)


@pytest.mark.slow
def test_the_averaged_backbone_is_exported_and_evaluated(tmp_path: Path, pool: PoolOf) -> None:
    assert pool(1).run(run, arguments(tmp_path, *ALL, "train.max_steps=4")) == [""]
    saved = read_weights(_checkpoint(tmp_path, 4))
    exported = str(tmp_path / "run" / "backbone.safetensors")
    backbone = timm.create_model("resnet8", num_classes=0, checkpoint_path=exported).state_dict()
    encoder = Run.open(tmp_path / "run").encoder().backbone.state_dict()
    for name, value in backbone.items():
        assert torch.equal(value, saved[f"average.backbone.{name}"]) and torch.equal(value, encoder[name])
    assert not torch.equal(backbone["conv1.weight"], saved["backbone.conv1.weight"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["method.name=scpl", "mixing.mixup=0.2"],
            "mixing.mixup=0.2: unit layer1 of method.name=scpl needs one class",
        ),
        *slow(
            [
                (
                    ["method.name=gim", "mixing.cutmix=1.0"],
                    "mixing.cutmix=1: mixes images with labels, and method.name=gim",
                ),
                (
                    ["method.name=gim", "train.label_smoothing=0.1"],
                    "train.label_smoothing=0.1: method.name=gim has no cross",
                ),
                (
                    ["method.name=infopro", "method.head.task=contrast", "mixing.cutmix=1.0"],
                    "mixing.cutmix=1: unit layer1 ",
                ),
                (
                    ["mixing.mixup=1.0", "train.batch_size=33"],
                    "train.batch_size=33: mixing pairs images, and a rank's",
                ),
            ]
        ),
    ],
)
def test_what_can_not_be_mixed_or_smoothed_is_refused(
    tmp_path: Path, pool: PoolOf, overrides: list[str], message: str
) -> None:
    (found,) = pool(1).run(run, arguments(tmp_path, "network.cut=stage", *overrides))
    assert found.startswith(message)


def test_rand_augment_goes_with_some_views_and_no_cache() -> None:
    begin = [str(RECIPES / "quickstart_mlaan.yaml"), "views.rand_augment=rand-m9"]
    for override, wanted in (
        ("views.kind=simclr", "supervised or cifar"),
        ("data.cache=memory", "data.cache=none"),
    ):
        with pytest.raises(UserError, match=f"^command line: views.rand_augment=rand-m9: .*{wanted}"):
            loading.load([*begin, override])


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["bp", "dgl", "mlaan", "infopro", "dfa", "auglocal", "hpff", "man", "fa", "sign"]
)
def test_methods_with_labels_learn_from_mixed_ones(tmp_path: Path, pool: PoolOf, method: str) -> None:
    overrides = [
        *ALL,
        "network.cut=stage",
        "train.max_steps=2",
        f"method.name={method}",
        "evaluate.knn=false",
    ]
    assert pool(1).run(run, arguments(tmp_path, *overrides)) == [""]


@pytest.mark.slow
def test_the_recipe_that_has_all_of_it_makes_two_steps(tmp_path: Path, pool: PoolOf) -> None:
    """On a small ViT and digits."""
    vit = "network.args={img_size:16,patch_size:4,depth:4,embed_dim:48,num_heads:2}"
    small = [
        "data.prepare=digits",
        "data.image_size=16",
        "data.num_classes=10",
        "data.workers=0",
        "train.batch_size=64",
    ]
    where = [f"data.path={tmp_path / 'digits'}", f"run_dir={tmp_path / 'run'}"]
    recipe = str(RECIPES / "dgl_vits16_300ep.yaml")
    assert pool(1).run(run, [recipe, *where, *small, vit, "train.max_steps=2"]) == [""]
    assert len(losses(tmp_path)) == 2 and "test_top1" in result(tmp_path)


def _checkpoint(folder: Path, step: int) -> Path:
    return folder / "run" / "checkpoints" / f"step-{step:08d}"
