"""The files of one checkpoint, from which any engine on any number of ranks can go on.

A folder holds

* ``model.safetensors``: parameters and buffers by name;
* ``optimizer.safetensors``: full tensors named ``<parameter>/<key>``;
* ``state.json``: step, optimizer and whatever the training loop adds (recipe, position in the data);
* ``manifest.json``: SHA-256 of the other three, with which they are compared when they are read.

It gets its name only when it is whole and on the disk, so a crash at any moment leaves the earlier ones.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from framework.engines.base import OptimizerState
from framework.runtime.errors import UserError, is_transient
from framework.runtime.files import new_file, sha256_of, unlocked

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
MANIFEST = "manifest.json"


def write_files(
    folder: Path,
    model: dict[str, Tensor],
    optimizer: OptimizerState,
    state: dict[str, Any],
    check: Callable[[], None] = unlocked,
) -> None:
    """Write a checkpoint's folder. It gets its name when all of it is on the disk, and replaces one of that name.

    ``check`` says whether this process may still write, before the first byte and before the last step.

    Raises:
        UserError: by ``check``; or it can't be written. A folder of that name is untouched, unless it is the swap that
            failed: then the old one may be left as ``.NAME.old``, or the new one be in place.
    """
    # Of a name of its own: a start that lives on, and is told so by ``check`` too late, must not meet it.
    partial = folder.with_name(f".{folder.name}.{uuid4().hex[:8]}.partial")
    check()
    try:
        for torn in folder.parent.glob(".step-*.partial"):  # of runs that were killed here
            shutil.rmtree(torn)
        partial.mkdir(parents=True)
        flat = {f"{name}/{key}": value for name, values in optimizer.items() for key, value in values.items()}
        manifest = {
            "model.safetensors": _write(partial / "model.safetensors", to_bytes(model)),
            "optimizer.safetensors": _write(partial / "optimizer.safetensors", to_bytes(flat)),
            "state.json": _write(partial / "state.json", json.dumps(state, indent=1).encode()),
        }
        _write(partial / MANIFEST, json.dumps(manifest, indent=1).encode())
        _flush(partial)
        check()
        _put_in_place(partial, folder)
        _flush(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{folder}: can't be written: {error}; earlier checkpoints are untouched") from error


def _put_in_place(partial: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _write(path: Path, content: bytes) -> str:
    """Write a file; the SHA-256 of what was meant to be written, which the file is compared with when it is read."""
    with new_file(path) as file:
        file.write(content)
    return sha256_of(content)


def _flush(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def identity_of(folder: Path) -> dict[str, str]:
    """Name of a checkpoint, and SHA-256 of its weights: of a run that is trained again, names alone are the same."""
    manifest = json.loads((folder / MANIFEST).read_text())
    return {"checkpoint": folder.name, "weights": manifest["model.safetensors"]}


def damage_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, None if nothing is.

    Raises:
        UserError: the file system fails for the moment, so that nobody can say.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except OSError as error:
        return _unread(folder / MANIFEST, error)
    except ValueError:
        return f"{MANIFEST} is damaged"
    if not isinstance(manifest, dict) or set(manifest) != set(FILES):
        return f"{MANIFEST} is damaged"
    for name in FILES:
        try:
            if sha256_of(folder / name) != manifest[name]:
                return f"{name} is damaged: its SHA-256 is not that of {MANIFEST}"
        except OSError as error:
            return _unread(folder / name, error)
    return None


def _unread(path: Path, error: OSError) -> str:
    if is_transient(error):
        raise UserError(f"{path}: can't be read for the moment: {error.strerror}") from error
    return f"{path.name} can't be read ({error.strerror})"


def read_files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], OptimizerState]:
    """State, model and optimizer of a folder, as ``write_files`` was given them.

    Raises:
        UserError: a file can't be read.
    """
    optimizer: OptimizerState = {}
    try:
        state = json.loads((folder / "state.json").read_text())
        model = load_file(folder / "model.safetensors")
        for name, value in load_file(folder / "optimizer.safetensors").items():
            parameter, _, key = name.rpartition("/")
            optimizer.setdefault(parameter, {})[key] = value
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: can't be read: {error}") from error
    return state, model, optimizer
