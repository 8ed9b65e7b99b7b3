"""What was done to tensors without memory, so that the values of each can be computed when they are wanted.

A ``History`` belongs to the storage of a tensor on the device ``meta`` and lists the calls that made and changed it. To
compute the values these calls are made again on the CPU, whole and with the same random numbers, so they are bitwise
what they would have been. Only what the values follow from is computed, and freed afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.overrides import handle_torch_function, has_torch_function_unary

from framework.network.values import leaves, mapped


class Unrecordable(Exception):
    """What code does to a tensor without memory can't be recorded, or its values are asked for and it has none."""


def computed(tensor: Tensor) -> Tensor:
    """A tensor of a network that is being built, with values to look at; where they were not just recorded, itself."""
    if has_torch_function_unary(tensor):
        result: Tensor = handle_torch_function(computed, (tensor,), tensor)
        return result
    return tensor


@dataclass(eq=False)
class History:
    """Of a storage.

    Attributes:
        nbytes: its size.
        changes: in order; the first made it. Its version is their number.
    """

    nbytes: int
    changes: list[Change] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Read:
    """A tensor as a call saw it.

    Attributes:
        history: of its storage.
        version: the number of changes before the call.
        dtype: its type.
        layout: offset, size and strides in the storage.
        written: whether the call changes it.
    """

    history: History
    version: int
    dtype: torch.dtype
    layout: tuple[int, torch.Size, tuple[int, ...]]
    written: bool = False

    @classmethod
    def of(cls, tensor: Tensor, history: History, written: bool = False) -> Read:
        """A tensor as it is now."""
        layout = (int(tensor.storage_offset()), tensor.size(), tensor.stride())
        return cls(history, len(history.changes), tensor.dtype, layout, written)

    def on(self, storage: UntypedStorage) -> Tensor:
        """The tensor, in a storage with values."""
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.layout)


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor with values that a call read.

    Attributes:
        tensor: the same, or a copy.
        version: PyTorch's count of changes, which must stay.
    """

    tensor: Tensor
    version: int


@dataclass(frozen=True)
class Drawn:
    """A generator of random numbers, by its state before a call."""

    state: Tensor


@dataclass(frozen=True, eq=False)
class Call:
    """One call.

    Attributes:
        function: of PyTorch's.
        args: with ``Read``, ``Constant`` and ``Drawn`` in place of tensors and generators.
        kwargs: likewise.
        state: of the CPU's random numbers before it, where it draws some.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: Tensor | None


@dataclass(frozen=True, eq=False)
class Change:
    """What a call did to a storage.

    Attributes:
        call: the call.
        made: which of the call's results is in this storage, and how; ``None`` where it changed what was there.
        overwrites: whether nothing is left of what was there.
    """

    call: Call
    made: tuple[int, Read] | None
    overwrites: bool


class Replay:
    """Computes values; storages that several calls read are computed once, and live as long as this object."""

    def __init__(self) -> None:
        self._known: dict[tuple[History, int], UntypedStorage] = {}

    def tensor(self, read: Read) -> Tensor:
        """The values of a tensor; not to be changed."""
        return read.on(self._storage(read.history, read.version))

    def _storage(self, history: History, version: int) -> UntypedStorage:
        waiting = [
            (history, version)
        ]  # not a recursion: a chain of calls may be as long as a network is deep
        while waiting:
            key = waiting[-1]
            if key not in self._known:
                if missing := [read for read in self._needed(*key) if read not in self._known]:
                    waiting += missing
                    continue
                self._known[key] = self._computed(*key)
            waiting.pop()
        return self._known[history, version]

    def _needed(self, history: History, version: int) -> Iterator[tuple[History, int]]:
        """The other storages that one follows from."""
        for change in _since_overwritten(history, version):
            for leaf in leaves((change.call.args, change.call.kwargs)):
                if isinstance(leaf, Read) and leaf.history is not history:
                    yield leaf.history, leaf.version

    def _computed(self, history: History, version: int) -> UntypedStorage:
        storage = UntypedStorage(0)
        for change in _since_overwritten(history, version):
            if change.made is None:
                if change.overwrites:
                    storage = UntypedStorage(history.nbytes)
                self._run(change.call, history, storage)
            else:
                storage = self._placed(change.call, *change.made)
        return storage

    def _placed(self, call: Call, number: int, read: Read) -> UntypedStorage:
        """The storage of one of a call's results, laid out as it was on the device ``meta``."""
        given, result = self._run(call)
        made = [leaf for leaf in leaves(result) if isinstance(leaf, Tensor)][number]
        layout = (made.storage_offset(), made.size(), made.stride())
        own = made.untyped_storage()
        if (
            layout == read.layout
            and own.nbytes() == read.history.nbytes
            and own.data_ptr() not in {tensor.untyped_storage().data_ptr() for tensor in given}
        ):
            return own
        storage = UntypedStorage(read.history.nbytes)
        read.on(storage).copy_(made)
        return storage

    def _run(
        self, call: Call, history: History | None = None, storage: UntypedStorage | None = None
    ) -> tuple[list[Tensor], Any]:
        """The tensors that a call is given and what it returns; what it changes of ``history`` is in ``storage``."""

        def real(leaf: Any) -> Any:
            if isinstance(leaf, Read):
                if leaf.history is history:
                    assert storage is not None
                    return leaf.on(storage)
                own = self._storage(leaf.history, leaf.version)
                return leaf.on(own.clone() if leaf.written else own)
            if isinstance(leaf, Constant):
                if leaf.tensor._version != leaf.version:
                    raise Unrecordable("a tensor was changed after a network's weights were copied from it")
                return leaf.tensor
            if isinstance(leaf, Drawn):
                return torch.Generator().set_state(leaf.state)
            return leaf

        args, kwargs = mapped(real, call.args), mapped(real, call.kwargs)
        given = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        with torch.random.fork_rng(devices=[]) if call.state is not None else nullcontext(), torch.no_grad():
            if call.state is not None:
                torch.set_rng_state(call.state)
            return given, call.function(*args, **kwargs)


def _since_overwritten(history: History, version: int) -> list[Change]:
    """The changes up to a version of which something is left."""
    changes = history.changes[:version]
    first = max(number for number, change in enumerate(changes) if change.overwrites)
    return changes[first:]
