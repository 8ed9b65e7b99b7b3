"""Checkpoints: folders of safetensors and JSON that any engine on any number of ranks can go on from.

``<run_dir>/checkpoints/step-00000123/`` holds

* ``model.safetensors``: parameters and buffers by name;
* ``optimizer.safetensors``: full tensors named ``<parameter>/<key>``;
* ``state.json``: step, optimizer and whatever the training loop adds (recipe, position in the data);
* ``manifest.json``: SHA-256 of the other three.

A folder gets its name only when it is whole and on the disk, so a crash at any moment leaves the earlier ones.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from framework.checkpoints.folder import damage_of, read_files, write_files
from framework.checkpoints.retention import Keep, superfluous
from framework.engines.base import Engine, OptimizerState
from framework.runtime.distributed import from_main, is_main, same_outcome
from framework.runtime.errors import UserError
from framework.runtime.files import write_whole

FORMAT = 1

logger = logging.getLogger(__name__)


class Snapshot(NamedTuple):
    """A moment of a run, apart from the engine: on rank 0 all of it, elsewhere only the step.

    Attributes:
        step: optimizer steps done.
        model: parameters and buffers by name.
        optimizer: full tensors by parameter and key.
        state: what else is known of the moment.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: OptimizerState
    state: dict[str, Any]


def snapshot(engine: Engine, step: int, state: Mapping[str, Any]) -> Snapshot:
    """Copies of everything that a checkpoint holds; all ranks must call it.

    Args:
        engine: whose network and optimizer are copied, to rank 0's CPU.
        step: optimizer steps done.
        state: what else ``load`` is to return; JSON's types only.

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


def write(run_dir: Path, moment: Snapshot, keep: Keep | None = None) -> Path:
    """Write a checkpoint on this rank alone, and delete those that ``keep`` does not want.

    Args:
        run_dir: folder of the run.
        moment: of rank 0; its step names the folder. One of that name is replaced.
        keep: judges by ``loss`` in the states; two stay if left out.

    Returns:
        The new folder.

    Raises:
        UserError: it can't be written. Earlier checkpoints are untouched.
    """
    folder = _folder(run_dir, moment.step)
    write_files(folder, moment.model, moment.optimizer, moment.state)
    # Later ones are those of a run that went back to an earlier step; they are not ours to delete.
    with suppress(OSError):  # where one can't be judged for the moment, the next save deletes
        losses = {_step(f): _loss(f) for f in _folders(run_dir) if _step(f) <= moment.step}
        for step in superfluous(losses, keep or Keep()):
            shutil.rmtree(_folder(run_dir, step), ignore_errors=True)
    return folder


def save(
    run_dir: Path, engine: Engine, step: int, state: Mapping[str, Any], keep: Keep | None = None
) -> Path:
    """``snapshot`` and ``write`` in one; all ranks must call it, and return when it is on the disk.

    Raises:
        UserError: on every rank, as they do.
    """
    moment = snapshot(engine, step, state)
    with same_outcome():
        if is_main():
            write(run_dir, moment, keep)
    return _folder(run_dir, step)


def newest(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, None if it has no checkpoint; all ranks must call it.

    Rank 0 compares every file with the manifest; a damaged checkpoint is passed over with a warning.

    Raises:
        UserError: there are checkpoints and all of them are damaged.
    """
    found = None
    with same_outcome():
        if is_main():
            found = _newest_whole(run_dir)
    path = from_main(str(found) if found else None)
    return Path(path) if path else None


def load(folder: Path, engine: Engine) -> dict[str, Any]:
    """Put a checkpoint into an engine; all ranks must call it and see the folder.

    Returns:
        What ``save`` was given as ``state``, and ``step``.

    Raises:
        UserError: the folder is missing or damaged, or belongs to another network or optimizer.
    """
    with same_outcome():
        if damage := damage_of(folder):  # as this rank reads it
            raise UserError(f"{folder}: {damage}")
        state, model, optimizer = read_files(folder)
        _check(folder, state, model, engine)
    engine.load_model_state(model)
    engine.load_optimizer_state(optimizer)
    return state


def set_aside_later(run_dir: Path, step: int) -> list[str]:
    """Rename checkpoints past ``step``, which a run that goes back there would take for its own; the new names."""
    renamed = []
    for folder in _folders(run_dir):
        if _step(folder) > step:
            aside = folder.with_name(f"abandoned-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            renamed.append(folder.rename(aside).name)
    return renamed


def read_model(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """State and model tensors of a checkpoint, for one process that has no engine.

    Raises:
        UserError: the folder is damaged.
    """
    if damage := damage_of(folder):
        raise UserError(f"{folder}: {damage}")
    state, model, _ = read_files(folder)
    return state, model


def export_backbone(engine: Engine, path: Path) -> None:
    """Write the backbone alone, under timm's names; all ranks must call it.

    ``timm.create_model(name, num_classes=0, checkpoint_path=path)`` reads the file.

    Raises:
        UserError: on every rank, if rank 0 can't write. An earlier file of that name is untouched.
    """
    model = engine.model_state()
    with same_outcome():
        if is_main():
            backbone = {n.removeprefix("backbone."): t for n, t in model.items() if n.startswith("backbone.")}
            write_whole(path, to_bytes(backbone, metadata={"format": "pt"}))


def _folders(run_dir: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    return sorted(
        (f for f in run_dir.glob("checkpoints/step-*") if f.is_dir() and re.fullmatch(r"step-\d+", f.name)),
        key=_step,
    )


def _folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _loss(folder: Path) -> float | None:
    """What ``state`` said of it; ``None`` for one that is damaged or has none.

    Raises:
        OSError: the file system fails.
    """
    try:
        return float(json.loads((folder / "state.json").read_text())["loss"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _newest_whole(run_dir: Path) -> Path | None:
    folders = _folders(run_dir)
    unread: UserError | None = None
    for folder in reversed(folders):
        damage: str | UserError | None
        try:
            damage = damage_of(folder)
        except UserError as error:
            if getattr(error.__cause__, "errno", None) != errno.EIO:  # which may be a bad sector, and stay
                raise
            damage = unread = error
        if damage is None:
            return folder
        logger.warning("%s: passed over: %s", folder, damage)
    if unread:
        raise unread
    if folders:
        raise UserError(
            f"{run_dir / 'checkpoints'}: all {len(folders)} checkpoints are damaged; delete them to start afresh"
        )
    return None


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
