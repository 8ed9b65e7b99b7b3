"""The files of one checkpoint, from which any engine on any number of ranks can go on.

A folder holds

* ``model.safetensors``: parameters and buffers by name;
* ``optimizer.safetensors``: full tensors named ``<parameter>/<key>``;
* ``state.json``: step, optimizer and whatever the training loop adds (recipe, position in the data);
* ``manifest.json``: SHA-256 of the other three, with which they are compared when they are read.

Where no rank has whole weights, each of N ranks writes ``model-00001-of-0000N.safetensors`` and an optimizer's file
with its parts, vectors. Whole shapes are in their metadata, and what is not cut in the first.
(``torch.distributed.checkpoint`` does without checksums, and its own metadata is a pickle.)

It gets its name only when it is whole and on the disk, so a crash at any moment leaves the earlier ones.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch import Tensor

from framework.checkpoints.tensor_files import CUT, Keyed, Tensors, write_tensors
from framework.engines.base import SavedOptimizer, Share
from framework.engines.state import COUNTERS
from framework.runtime.errors import UserError
from framework.runtime.files import new_file, sha256_of, unlocked

STATE = "state.json"
MANIFEST = "manifest.json"
SHA = ".sha256"  # behind the name of a file that another rank has written
TURN = 0.05  # seconds between two looks for those


def files_of(count: int) -> tuple[str, ...]:
    """Names of the files in the manifest of a checkpoint in so many shares."""
    shares = [share_files(number, count) for number in range(count)]
    return (*(model for model, _ in shares), *(optimizer for _, optimizer in shares), STATE)


def share_files(number: int, count: int) -> tuple[str, str]:
    """Names of a share's model and optimizer files."""
    which = f"-{number + 1:05d}-of-{count:05d}" if count > 1 else ""
    return f"model{which}.safetensors", f"optimizer{which}.safetensors"


FILES = files_of(1)


def write_files(
    folder: Path,
    model: Mapping[str, Tensor],
    optimizer: SavedOptimizer,
    state: Mapping[str, Any],
    check: Callable[[], None] = unlocked,
) -> None:
    """Write a checkpoint's folder from whole tensors, as ``write_share`` does.

    Raises:
        UserError: as there.
    """
    write_share(folder, uuid4().hex[:8], Share(0, 1, model, optimizer), state, check)


def write_share(
    folder: Path,
    token: str,
    share: Share,
    state: Mapping[str, Any],
    check: Callable[[], None] = unlocked,
    patience: Callable[[], float] = lambda: float("inf"),
) -> None:
    """Write this rank's share; the first one's waits for the others, and puts the folder in place.

    The folder gets its name when all of it is on the disk, and replaces one of that name. Where one of several ranks
    fails, others may still be writing: then the partial folder is left to whoever has waited for all of them.

    Args:
        folder: of the checkpoint.
        token: that no other start uses, nor another save of this one; all shares have it. It names what is partial.
        share: what to write; its number is not ``None``.
        state: what ``state.json`` is to hold.
        check: says whether this process may still write, before the first byte and before the last step.
        patience: how many seconds the first share waits for news of the others.

    Raises:
        UserError: by ``check``; it can't be written; others have not come. A folder of that name is untouched, unless
            it is the swap that failed: then the old one may be left as ``.NAME.old``, or the new one be in place.
    """
    # Of a name of its own: a start that lives on, and is told so by ``check`` too late, must not meet it.
    partial = partial_folder(folder, token)
    check()
    try:
        if share.number == 0:
            for torn in folder.parent.glob(".step-*.partial"):  # of runs that were killed here
                if torn != partial:
                    shutil.rmtree(torn)
        partial.mkdir(parents=True, exist_ok=True)
        manifest = _write_tensors(partial, share)
        if share.number != 0:
            for name, digest in manifest.items():
                _write(partial / f"{name}{SHA}", digest.encode())
            return
        _await(partial, share.count, manifest, patience)
        manifest[STATE] = _write(partial / STATE, json.dumps(state, indent=1).encode())
        ordered = {name: manifest[name] for name in files_of(share.count)}
        _write(partial / MANIFEST, json.dumps(ordered, indent=1).encode())
        _flush(partial)
        check()
        _put_in_place(partial, folder)
        _flush(folder.parent)
    except OSError as error:
        if share.count == 1:
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{folder}: can't be written: {error}; earlier checkpoints are untouched") from error


def partial_folder(folder: Path, token: str) -> Path:
    """Where the files of a checkpoint are until all of them are there."""
    return folder.with_name(f".{folder.name}.{token}.partial")


def _write_tensors(partial: Path, share: Share) -> dict[str, str]:
    """SHA-256 by name of the files."""
    assert share.number is not None
    flat = {
        f"{name}/{key}": value for name, values in share.optimizer.items() for key, value in values.items()
    }
    cut = {
        f"{name}/{key}": share.shapes[name]
        for name, values in share.optimizer.items()
        for key in values
        if name in share.shapes and key not in COUNTERS
    }
    return {
        name: write_tensors(partial / name, tensors, {CUT: json.dumps(shapes)} if shapes else {})
        for name, tensors, shapes in zip(
            share_files(share.number, share.count), (share.model, flat), (share.shapes, cut), strict=True
        )
    }


def _await(partial: Path, count: int, manifest: dict[str, str], patience: Callable[[], float]) -> None:
    """Wait until other ranks have written their files, and take what they say of them into ``manifest``.

    This is looked for in the folder, since a thread beside the training can't use collectives.

    Raises:
        OSError: there was no news of them for longer than ``patience``.
    """
    seen, since = None, 0.0
    while missing := [name for name in files_of(count)[:-1] if name not in manifest]:
        if (now := _sizes(partial)) != seen:
            seen, since = now, time.monotonic()
        come = [name for name in missing if f"{name}{SHA}" in now]
        for name in come:
            said = partial / f"{name}{SHA}"
            manifest[name] = said.read_text()
            said.unlink()
        if not come:
            if time.monotonic() - since >= patience():
                raise OSError(f"{missing[0]} is missing: its rank has not written it")
            time.sleep(TURN)


def _sizes(folder: Path) -> dict[str, int]:
    """Of the files in a folder; one may get its name meanwhile."""
    sizes = {}
    for entry in os.scandir(folder):
        try:
            sizes[entry.name] = entry.stat().st_size
        except FileNotFoundError:
            continue
    return sizes


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
    """Name of a checkpoint, and SHA-256 of its weights: of a run that is trained again, names alone are the same.

    Of several files it is that of their sums: the same weights in another number of files count as others.
    """
    manifest = json.loads((folder / MANIFEST).read_text())
    sums = [manifest[name] for name in manifest if name.startswith("model")]
    return {
        "checkpoint": folder.name,
        "weights": sums[0] if len(sums) == 1 else sha256_of("".join(sums).encode()),
    }


def shares_of(manifest: Mapping[str, str]) -> int:
    """How many there are of a checkpoint."""
    return max(1, len(manifest) // 2)


def read_files(folder: Path) -> tuple[dict[str, Any], Tensors, SavedOptimizer]:
    """State, model and optimizer of a folder, whose tensors are whole, and read when they are asked for.

    Raises:
        UserError: a file can't be read.
    """
    try:
        state = json.loads((folder / STATE).read_text())
    except OSError as error:
        raise UserError(f"{folder}: can't be read: {error}") from error
    optimizer = _read_share_files(folder, 1)
    keys: dict[str, list[str]] = {}
    for name in optimizer:
        parameter, _, key = name.rpartition("/")
        keys.setdefault(parameter, []).append(key)
    return state, read_weights(folder), {name: Keyed(optimizer, name, own) for name, own in keys.items()}


def read_weights(folder: Path) -> Tensors:
    """Parameters and buffers in a folder.

    Raises:
        UserError: a file can't be read.
    """
    return _read_share_files(folder, 0)


def _read_share_files(folder: Path, which: int) -> Tensors:
    try:
        count = shares_of(json.loads((folder / MANIFEST).read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / MANIFEST}: can't be read: {error}") from error
    return Tensors([folder / share_files(number, count)[which] for number in range(count)])
