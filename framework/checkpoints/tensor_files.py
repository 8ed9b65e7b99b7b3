"""Files of tensors in the safetensors format: written without a copy of them, read one tensor at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from framework.runtime.errors import UserError
from framework.runtime.files import new_file

# In the order of the format's own writer: what needs the widest alignment first.
_TYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_RANKS = {dtype: number for number, dtype in enumerate(_TYPES)}
CUT = "cut"  # key of the metadata: whole shapes of the tensors of which a file has a part
REOPEN = 1 << 28  # bytes read, after which files are mapped afresh


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write a file, the bytes that ``safetensors.torch.save`` makes; the SHA-256 of what was meant to be written.

    That function makes all of them in memory first, and ``save_file`` tells no checksum of them.

    Args:
        path: of the file.
        tensors: on the host.
        metadata: of one key at most, since that writer's order of several is any.

    Raises:
        OSError: it can't be written.
    """
    digest = hashlib.sha256()
    with new_file(path) as file:
        for content in _contents(tensors, metadata):
            file.write(content)
            digest.update(content)
    return digest.hexdigest()


def _contents(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[Any]:
    """What a file holds, in pieces that have Python's buffer protocol."""
    ordered = sorted(tensors.items(), key=lambda item: (_RANKS[item[1].dtype], item[0].encode()))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        kind = _TYPES[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


class Tensors(MutableMapping[str, Tensor]):
    """Tensors of files by name, read when they are asked for, and whole, whatever number of files has parts of them.

    A file is mapped, and what was read of it stays in resident memory while it is. Each is therefore opened again after
    some 256 MB. What is set or deleted here changes no file.

    Args:
        paths: one file, or in their order those that have parts; what is not cut is in the first.

    Attributes:
        shapes: by name.

    Raises:
        UserError: a file can't be read; so does every reading.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._files: list[safe_open] = []
        self._read = 0
        self._changed: dict[str, Tensor] = {}
        try:
            first = safe_open(paths[0], "pt")
            self._cut = json.loads((first.metadata() or {}).get(CUT, "{}"))
            found = {name: first.get_slice(name).get_shape() for name in first.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{paths[0]}: can't be read: {error}") from error
        self.shapes = {name: tuple(shape) for name, shape in (found | self._cut).items()}

    def __getitem__(self, name: str) -> Tensor:
        if name in self._changed:
            return self._changed[name]
        if name not in self.shapes:
            raise KeyError(name)
        if self._read > REOPEN:
            self._files, self._read = [], 0
        try:
            parts = [self._file(number).get_tensor(name) for number in range(self._parts(name))]
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self._paths[0].parent}: can't be read: {name}: {error}") from error
        self._read += sum(part.nbytes for part in parts)
        return torch.cat(parts).view(self.shapes[name]) if name in self._cut else parts[0]

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self._changed[name] = tensor
        self.shapes[name] = tuple(tensor.shape)

    def __delitem__(self, name: str) -> None:
        del self.shapes[name]
        self._changed.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def _parts(self, name: str) -> int:
        return len(self._paths) if name in self._cut else 1

    def _file(self, number: int) -> safe_open:
        while len(self._files) <= number:
            self._files.append(safe_open(self._paths[len(self._files)], "pt"))
        return self._files[number]


class Keyed(Mapping[str, Tensor]):
    """The tensors ``PREFIX/KEY`` by their keys.

    Args:
        tensors: those and others.
        prefix: of their names.
        keys: all that there are.
    """

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str, keys: Sequence[str]) -> None:
        self._tensors, self._prefix, self._keys = tensors, prefix, keys

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[f"{self._prefix}/{key}"]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
