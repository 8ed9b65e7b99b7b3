"""The state of a run after a step: copied from an engine, put back into one; and the backbone alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from framework.checkpoints.folder import damage_of, read_files
from framework.engines.base import Engine, OptimizerState
from framework.execution.local_network import LOSS_SCALES
from framework.execution.weight_average import PREFIX as AVERAGES
from framework.execution.weight_average import evaluated_backbone
from framework.runtime.distributed import is_main, same_outcome
from framework.runtime.errors import UserError
from framework.runtime.files import write_whole

FORMAT = 1
ABOUT = "stagewise"  # key of a backbone file's metadata


class Snapshot(NamedTuple):
    """The state of a run after a step, copied from the engine; on ranks other than 0 the tensors are missing.

    Attributes:
        step: optimizer steps done.
        model: parameters and buffers by name.
        optimizer: full tensors by parameter and key.
        state: whatever else is saved; JSON's types only.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: OptimizerState
    state: dict[str, Any]


def take_snapshot(engine: Engine, step: int, state: Mapping[str, Any]) -> Snapshot:
    """Copies of everything that a checkpoint holds; all ranks must call it.

    Args:
        engine: whose network and optimizer are copied, to rank 0's CPU.
        step: optimizer steps done.
        state: what else ``load_checkpoint`` is to return; JSON's types only.

    Raises:
        UserError: on every rank, if a weight is not finite. Nobody could go on from it.
    """
    model, optimizer = engine.model_state(), engine.optimizer_state()
    with same_outcome():
        for name, tensor in model.items():
            if not torch.isfinite(tensor).all():
                raise UserError(f"{name} is not finite after step {step}; earlier checkpoints are untouched")
    head = {"format": FORMAT, "step": step, "optimizer": type(engine.optimizer).__name__}
    return Snapshot(step, model, optimizer, {**head, **state})


def load_checkpoint(folder: Path, engine: Engine) -> dict[str, Any]:
    """Put a checkpoint into an engine; all ranks must call it and see the folder.

    Loss scales belong to float16 alone: from another precision they start afresh, to another one they are dropped.

    Returns:
        The ``state`` that ``take_snapshot`` was given, and ``step``.

    Raises:
        UserError: the folder is missing or damaged, or belongs to another network or optimizer.
    """
    with same_outcome():
        if damage := damage_of(folder):  # as this rank reads it
            raise UserError(f"{folder}: {damage}")
        state, model, optimizer = read_files(folder)
        _take_over_precision(folder, model, engine)
        _take_over_average(folder, model, engine)
        _check(folder, state, model, engine)
    engine.load_model_state(model)
    engine.load_optimizer_state(optimizer)
    return state


def read_model(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """State and model tensors of a checkpoint, for one process that has no engine.

    Raises:
        UserError: the folder is damaged.
    """
    if damage := damage_of(folder):
        raise UserError(f"{folder}: {damage}")
    state, model, _ = read_files(folder)
    return state, model


def export_backbone(engine: Engine, path: Path, about: Mapping[str, Any] | None = None) -> None:
    """Write the backbone alone, averaged if the network has averages, under timm's names; all ranks must call it.

    ``timm.create_model(name, num_classes=0, checkpoint_path=path)`` reads the file.

    Args:
        engine: whose network is written.
        path: the safetensors file.
        about: for whoever reads the file; JSON in its metadata, under one key, since safetensors writes several in any
            order, and the same weights are to give the same bytes.

    Raises:
        UserError: on every rank, if rank 0 can't write. An earlier file of that name is untouched.
    """
    model = engine.model_state()
    with same_outcome():
        if is_main():
            backbone = evaluated_backbone(model)
            write_whole(path, to_bytes(backbone, metadata={ABOUT: json.dumps(about or {})}))


def _take_over_precision(folder: Path, model: dict[str, Tensor], engine: Engine) -> None:
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


def _take_over_average(folder: Path, model: dict[str, Tensor], engine: Engine) -> None:
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


def _check(folder: Path, state: dict[str, Any], model: dict[str, Tensor], engine: Engine) -> None:
    if state["format"] != FORMAT:
        raise UserError(f"{folder}: its format is {state['format']}, and this version reads {FORMAT}")
    here, there = _shapes(engine.net.state_dict()), _shapes(model)
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


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
