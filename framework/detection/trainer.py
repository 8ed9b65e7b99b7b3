"""Mask R-CNN on Detectron2's own trainer, with checks that nothing is quietly missing."""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import detectron2
import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer, default_setup
from detectron2.utils import comm
from torch import nn
from yaml import YAMLError

from framework.detection import backbones, datasets, verification
from framework.detection.normalization import pixels_of
from framework.runtime.command import status
from framework.runtime.errors import UserError
from framework.runtime.run_lock import held
from framework.tracking.environment import environment
from framework.tracking.metric_log import write_result

NORMS = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")  # sections of MODEL with a key NORM
BOTTOM_UP = "backbone.bottom_up."

logger = logging.getLogger(__name__)


def configuration(file: Path, overrides: list[str], split: int | None = None) -> CfgNode:
    """A YAML file and ``KEY VALUE`` overrides over Detectron2's defaults.

    Without a GPU the device is the CPU, where SyncBN is BN.

    Args:
        file: one of ``recipes/detectron2``, or like them.
        overrides: such as ``["MODEL.WEIGHTS", "backbone.pkl"]``.
        split: number of the subset of COCO to train on instead of the file's; its results get a folder of their own.

    Raises:
        UserError: the file or a key is unknown, or a value doesn't fit.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such configuration")
    cfg = get_cfg()
    backbones.add_config(cfg)
    try:
        cfg.merge_from_file(str(file), allow_unsafe=False)
        cfg.merge_from_list(overrides)
    except (AssertionError, KeyError, ValueError, YAMLError) as error:
        raise UserError(
            f"{file} {' '.join(overrides)}: {str(error).strip() or type(error).__name__}"
        ) from error
    if split is not None:
        _choose_split(cfg, split)
    _use_normalization(cfg, overrides)
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.DEVICE == "cpu":
        _replace_sync_bn(cfg)
    cfg.freeze()
    return cfg


def prepare(arguments: Namespace) -> CfgNode:
    """The configuration, with its sets registered and their files and that of the weights there.

    Raises:
        UserError: one is missing, or doesn't fit.
    """
    cfg = configuration(Path(arguments.config_file), arguments.opts, arguments.split)
    datasets.prepare(cfg.DATASETS.TEST if arguments.eval_only else [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
    _check_weights(cfg, arguments)
    return cfg


def work(arguments: Namespace) -> None:
    """``run`` in a process of a launch, which ends with the exit status of a command."""
    sys.exit(status(partial(run, arguments)))


def run(arguments: Namespace) -> None:
    """Train and evaluate, or evaluate only.

    Raises:
        UserError: whatever the person who started it can mend.
    """
    cfg = prepare(arguments)
    with held(Path(cfg.OUTPUT_DIR), "set another OUTPUT_DIR"):
        default_setup(cfg, arguments)
        if arguments.eval_only:
            model = Trainer.build_model(cfg)
            verification.load(model, Path(cfg.MODEL.WEIGHTS), "")
            Trainer.test(cfg, model)
            return
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=arguments.resume)
        trainer.train()


class Trainer(DefaultTrainer):
    """Detectron2's, on the sets' own evaluators; each evaluation leaves ``result.json`` in ``OUTPUT_DIR``."""

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The detector, its frozen BatchNorms as ``MODEL.BACKBONE.FROZEN_BN`` has them."""
        model = super().build_model(cfg)
        if cfg.MODEL.BACKBONE.FROZEN_BN == "batch":
            backbones.thaw_statistics(model.backbone.bottom_up)
        return model

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Boxes and masks."""
        return datasets.evaluator(dataset_name, str(Path(cfg.OUTPUT_DIR) / "inference"))

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> Any:
        """Evaluate on ``DATASETS.TEST`` and write the result."""
        scores = super().test(cfg, model, evaluators)
        if comm.is_main_process():
            result = {
                **scores,
                "weights": cfg.MODEL.WEIGHTS,
                "train": list(cfg.DATASETS.TRAIN),
                "test": list(cfg.DATASETS.TEST),
                "detectron2": detectron2.__version__,
                **environment(comm.get_world_size(), torch.device(cfg.MODEL.DEVICE)),
            }
            write_result(Path(cfg.OUTPUT_DIR) / "result.json", result)
        return scores

    def resume_or_load(self, resume: bool = True) -> None:
        """Go on from the last checkpoint, or load ``MODEL.WEIGHTS`` and compare the backbone with the file.

        Raises:
            UserError: a tensor of the backbone is not the file's.
        """
        super().resume_or_load(resume)
        weights = self.cfg.MODEL.WEIGHTS
        if weights and not (resume and self.checkpointer.has_checkpoint()):
            content = verification.read(Path(weights))
            count = verification.check_arrival(self.checkpointer.model, content, BOTTOM_UP, Path(weights))
            logger.info("All %d tensors of the backbone are those of %s", count, weights)


def _check_weights(cfg: CfgNode, arguments: Namespace) -> None:
    """Before Detectron2 sees a file: it is nothing but tensors; and a frozen backbone has one."""
    if cfg.MODEL.WEIGHTS:
        verification.read(Path(cfg.MODEL.WEIGHTS))
    elif arguments.eval_only:
        raise UserError("--eval-only needs MODEL.WEIGHTS, such as OUTPUT_DIR/model_final.pth")
    elif cfg.MODEL.BACKBONE.FREEZE_AT > 0:
        raise UserError(
            f"MODEL.WEIGHTS is empty and MODEL.BACKBONE.FREEZE_AT={cfg.MODEL.BACKBONE.FREEZE_AT} freezes random "
            "layers: add MODEL.WEIGHTS backbone.pkl"
        )


def _use_normalization(cfg: CfgNode, overrides: list[str]) -> None:
    """Normalize images as in pretraining, unless the command line says how."""
    weights = Path(cfg.MODEL.WEIGHTS)
    if not cfg.MODEL.WEIGHTS or not weights.exists():  # which is said where they are read
        return
    for key, in_rgb in pixels_of(weights).items():
        values = in_rgb[::-1] if cfg.INPUT.FORMAT == "BGR" else in_rgb
        if f"MODEL.{key}" not in overrides and not np.allclose(cfg.MODEL[key], values, atol=0.01):
            print(f"MODEL.{key} is {values}, as {weights} was trained, and not {cfg.MODEL[key]}", flush=True)
            cfg.MODEL[key] = values


def _choose_split(cfg: CfgNode, split: int) -> None:
    names = [datasets.SUBSET.fullmatch(name) for name in cfg.DATASETS.TRAIN]
    if not all(names):
        raise UserError(f"--split {split}: DATASETS.TRAIN={list(cfg.DATASETS.TRAIN)} is no subset of COCO")
    cfg.DATASETS.TRAIN = tuple(f"coco_2017_train_{name[1]}_split{split}" for name in names if name)
    cfg.OUTPUT_DIR = str(Path(cfg.OUTPUT_DIR) / f"split{split}")


def _replace_sync_bn(cfg: CfgNode) -> None:
    synced = list(_synced(cfg))
    for section in synced:
        cfg.MODEL[section].NORM = "BN"
    if synced:
        print(f"warning: on the CPU SyncBN is BN: {', '.join(f'MODEL.{s}.NORM' for s in synced)}", flush=True)


def _synced(cfg: CfgNode) -> Iterator[str]:
    return (section for section in NORMS if cfg.MODEL[section].NORM == "SyncBN")
