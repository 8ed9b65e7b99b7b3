"""The state of a run after a step: copied from an engine, put back into one; and the backbone alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import torch

from framework.checkpoints.damage import check_whole, damage_of
from framework.checkpoints.folder import read_files
from framework.checkpoints.tensor_files import Tensors, write_tensors
from framework.engines.base import Engine, Share
from framework.execution.local_network import LOSS_SCALES
from framework.execution.weight_average import PREFIX as AVERAGES
from framework.execution.weight_average import evaluated_backbone, evaluated_prefix
from framework.runtime.distributed import from_main, is_main, own_errors, same_outcome
from framework.runtime.errors import UserError

FORMAT = 1
ABOUT = "stagewise"  # key of a backbone file's metadata


class Snapshot(NamedTuple):
    """The state of a run after a step, copied from the engine.

    Attributes:
        step: optimizer steps done.
        share: this rank's, of weights and optimizer.
        state: whatever else is saved; JSON's types only.
        token: no other snapshot has it, and all ranks' have the same.
    """

    step: int
    share: Share
    state: dict[str, Any]
    token: str


def take_snapshot(engine: Engine, step: int, state: Mapping[str, Any]) -> Snapshot:
    """Copies of everything that a checkpoint holds; all ranks must call it.

    Args:
        engine: whose network and optimizer are copied, to the CPU of rank 0 or, of an engine that cuts them, each
            rank's.
        step: optimizer steps done.
        state: what else ``load_checkpoint`` is to return; JSON's types only.

    Raises:
        UserError: on every rank, if a weight is not finite. Nobody could go on from it.
    """
    share = engine.share()
    with same_outcome():
        for name, tensor in share.model.items():
            if not torch.isfinite(tensor).all():
                raise UserError(f"{name} is not finite after step {step}; earlier checkpoints are untouched")
    head = {"format": FORMAT, "step": step, "optimizer": type(engine.optimizer).__name__}
    return Snapshot(step, share, {**head, **state}, from_main(uuid4().hex[:8]))


def load_checkpoint(folder: Path, engine: Engine) -> dict[str, Any]:
    """Put a checkpoint into an engine; all ranks must call it and see the folder.

    Loss scales belong to float16 alone: from another precision they start afresh, to another one they are dropped.

    Returns:
        The ``state`` that ``take_snapshot`` was given, and ``step``.

    Raises:
        UserError: the folder is missing or damaged, or belongs to another network or optimizer.
    """
    check_whole(folder)
    with same_outcome():
        state, model, optimizer = read_files(folder)
        _take_over_precision(folder, model, engine)
        _take_over_average(folder, model, engine)
        _check(folder, state, model, engine)
    with own_errors():
        engine.load_model_state(model)
        engine.load_optimizer_state(optimizer)
    return state


def read_model(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """State and model tensors of a checkpoint, for one process that has no engine; they are read when asked for.

    Raises:
        UserError: the folder is damaged.
    """
    if damage := damage_of(folder):
        raise UserError(f"{folder}: {damage}")
    state, model, _ = read_files(folder)
    return state, model


def export_backbone(engine: Engine, path: Path, about: Mapping[str, Any] | None = None) -> None:
    """Write the backbone alone, averaged if the network has averages, under timm's names; all ranks must call it.

    ``timm.create_model(name, num_classes=0, checkpoint_path=path)`` reads the file, as one process whole; so rank 0 may
    hold the backbone in its host memory here. Other ranks hold no more than one tensor whole.

    Args:
        engine: whose network is written.
        path: the safetensors file.
        about: for whoever reads the file; JSON in its metadata, under one key, since safetensors writes several in any
            order, and the same weights are to give the same bytes.

    Raises:
        UserError: on every rank, if rank 0 can't write. An earlier file of that name is untouched.
    """
    backbone = evaluated_backbone(engine.model_state(evaluated_prefix(engine.model_shapes())))
    with same_outcome():
        if is_main():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_tensors(path, backbone, {ABOUT: json.dumps(about or {})})
            except OSError as error:
                raise UserError(f"{path}: can't be written: {error.strerror}") from error


def _take_over_precision(folder: Path, model: Tensors, engine: Engine) -> None:
    """Leave in ``model`` the loss scales that the engine's network has, and say so where they are others."""
    here = engine.net.state_dict()
    fresh = {name: here[name].clone().cpu() for name in here if name.startswith(LOSS_SCALES)}
    saved = [name for name in model if name.startswith(LOSS_SCALES)]
    if bool(fresh) == bool(saved):
        return
    for name in saved:
        del model[name]
    model.update(fresh)
    if is_main():
        what = "loss scales start afresh, it has none" if fresh else "its loss scales (fp16) are dropped"
        print(f"train.precision is another than in {folder}: {what}", flush=True)


def _take_over_average(folder: Path, model: Tensors, engine: Engine) -> None:
    """Drop from ``model`` an average of weights that the engine's network does without, and say so.

    Raises:
        UserError: the network has one, which nothing could begin with.
    """
    saved = [name for name in model if name.startswith(AVERAGES)]
    if engine.net.average is not None and not saved:
        raise UserError(
            f"{folder}: has no average of the weights (train.ema); set train.ema=0, or another run_dir"
        )
    if engine.net.average is None and saved:
        for name in saved:
            del model[name]
        if is_main():
            print(f"train.ema=0: the average of the weights in {folder} is dropped", flush=True)


def _check(folder: Path, state: dict[str, Any], model: Tensors, engine: Engine) -> None:
    if state["format"] != FORMAT:
        raise UserError(f"{folder}: its format is {state['format']}, and this version reads {FORMAT}")
    here, there = {name: tuple(shape) for name, shape in engine.model_shapes().items()}, model.shapes
    for name in [*here, *there]:
        if here.get(name) != there.get(name):
            raise UserError(
                f"{folder}: a checkpoint of another network: {name} is {there.get(name, 'missing')} there "
                f"and {here.get(name, 'missing')} here"
            )
    optimizer = type(engine.optimizer).__name__
    if state["optimizer"] != optimizer:
        raise UserError(
            f"{folder}: its optimizer is {state['optimizer']}, and optim.name asks for {optimizer}"
        )
