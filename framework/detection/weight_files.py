"""Files that Detectron2, torchvision and mmdetection read; written whole, and read without running code."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from framework.detection.layouts import SUFFIXES
from framework.runtime.errors import UserError
from framework.runtime.files import write_whole

#: all that a pickle of numpy arrays calls
_ARRAY_PARTS = {
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("_codecs", "encode"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "_reconstruct"),
}


def write(
    path: Path, to: str, network: str, tensors: Mapping[str, Tensor], more: Mapping[str, Any] | None = None
) -> None:
    """Write tensors for the library ``to``, whole or not at all.

    Detectron2 takes arrays in a pickle; a pickle without ``__author__`` it would read as one of Caffe2.

    Args:
        path: the file.
        to: one of ``SUFFIXES``.
        network: whose tensors they are.
        tensors: by that library's names.
        more: what else a file for Detectron2 is to say, as lists of numbers.

    Raises:
        UserError: the suffix is not the one by which the library knows the format, or it can't be written.
    """
    if path.suffix != SUFFIXES[to]:
        raise UserError(f"-o {path}: must end with {SUFFIXES[to]}, by which {to} knows the format")
    if to == "detectron2":
        arrays = {name: tensor.float().cpu().numpy() for name, tensor in tensors.items()}
        head = {"__author__": "stagewise", "matching_heuristics": True, "network": network}
        write_whole(path, pickle.dumps({**(more or {}), **head, "model": arrays}, protocol=4))
        return
    buffer = io.BytesIO()
    torch.save({"state_dict": dict(tensors)} if to == "mmdet" else dict(tensors), buffer)
    write_whole(path, buffer.getvalue())


def read_pickle(path: Path) -> dict[str, Any]:
    """A pickle in Detectron2's layout, if it is nothing but arrays.

    Raises:
        UserError: it names anything else, it is damaged, or the layout is another.
    """
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, encoding="latin1").load()
    except _NotAnArray as error:
        raise UserError(f"{path}: calls {error}, so it is more than arrays, and is not unpickled") from error
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from error
    except Exception as error:  # a damaged pickle raises whatever its broken bytes happen to mean
        raise UserError(f"{path}: damaged, or no pickle") from error
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("model"), dict)
        or "__author__" not in content
    ):
        raise UserError(f"{path}: not written for Detectron2: convert with tools/convert_to_detectron2.py")
    return content


class _NotAnArray(Exception):
    """Module and name of something else."""


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAY_PARTS:
            raise _NotAnArray(f"{module}.{name}")
        return super().find_class(module, name)
