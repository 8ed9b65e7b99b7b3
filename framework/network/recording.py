"""Records what is done to large tensors in place of doing it. What is private in PyTorch and needed for that is here.

Seen in PyTorch 2.11 and 2.15: ``TorchDispatchMode``, through which every call of a tensor's function goes, and
``OpOverload._schema``, which says what a function changes and returns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode

from framework.network.recorded import (
    Call,
    Change,
    Constant,
    Drawn,
    History,
    Read,
    Replay,
    Unrecordable,
)
from framework.network.values import leaves, mapped
from framework.runtime.heap import Heap

#: in-place functions that leave nothing of what was there
OVERWRITING = frozenset(
    (
        "aten::uniform_",
        "aten::normal_",
        "aten::bernoulli_",
        "aten::exponential_",
        "aten::log_normal_",
        "aten::cauchy_",
        "aten::geometric_",
        "aten::random_",
        "aten::zero_",
        "aten::fill_",
        "aten::copy_",
    )
)

_META, _CPU = torch.device("meta"), torch.device("cpu")


class Recording(TorchDispatchMode):
    """While it is active, large tensors are made on the device ``meta``, with a history.

    Smaller ones are made as ever, and large ones that are computed from large ones with values (from files, from
    NumPy) are, too. Random numbers are drawn whole where the code draws them, so the CPU's generator moves as ever.
    Whoever asks for a number of a tensor without memory (``item``) gets it: it is computed.
    Tensors that are made with ``device="meta"`` have no values, and so has all that follows from them.

    Args:
        large: bytes from which on a tensor is.

    Attributes:
        recorded: bytes of the tensors that got no memory.
        busy: whether a call is being recorded.
        blank: whether the call at hand is given the device ``meta``, or tensors on it that have no values.
        heap: of this process.
        kept: bytes of large tensors with values that calls have read; a copy stays as long as what follows from them.
        mapped: the same for those that lie in files, of which there is no copy.
    """

    def __init__(self, large: int) -> None:
        super().__init__()
        self._bytes = large
        self.recorded = self.kept = self.mapped = 0
        self.busy = self.blank = False
        self.heap = Heap()
        self._histories: WeakKeyDictionary[UntypedStorage, History] = WeakKeyDictionary()

    def history(self, tensor: Tensor) -> History | None:
        """Of the tensor's storage; ``None`` for tensors with values, or without any."""
        return self._histories.get(tensor.untyped_storage()) if tensor.is_meta else None

    def values(self, tensor: Tensor) -> Tensor:
        """The values of a tensor; not to be changed.

        Raises:
            Unrecordable: it was made without any.
        """
        return self._real(tensor, Replay())

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.busy = True
        try:
            return self._call_of(func, args, dict(kwargs or {}))
        finally:
            self.busy = False

    def _call_of(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("device") == _META:
            if self.blank:
                return func(*args, **kwargs)
            del kwargs["device"]  # PyTorch's own code takes that of another tensor
        tensors = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = [tensor for tensor in tensors if self.history(tensor) is not None]
        written = _written(func, args, kwargs)
        if len(known) < sum(tensor.is_meta for tensor in tensors):
            if any(self.history(tensor) is not None or not tensor.is_meta for tensor in written):
                raise Unrecordable(f"{func} writes a tensor without values into one that has some")
            return func(*_on_meta(args), **_on_meta(kwargs))
        if not known:
            return self._of_values(func, args, kwargs, tensors)
        if _asks(func) or any(not tensor.is_meta for tensor in written):
            return self._computed(func, args, kwargs)
        if kwargs.get("device") is not None and func is torch.ops.aten._to_copy.default:
            return self._computed(func, args, kwargs)  # PyTorch's own code is about to read it (tolist)
        return self._recorded(func, args, kwargs, written)

    def _of_values(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> Any:
        """A call without tensors, or with values for all."""
        large = any(tensor.layout is not torch.strided or self._large(tensor) for tensor in tensors)
        makes = tensors or any(argument.name == "device" for argument in func._schema.arguments)
        if large or not makes or _asks(func) or _written(func, args, kwargs):
            return func(*args, **kwargs)
        try:
            shapes = func(*_on_meta(args), **_on_meta(kwargs, made=not tensors))
        except (NotImplementedError, RuntimeError):  # its shape depends on values, or it fails
            return func(*args, **kwargs)
        if not any(self._large(leaf) for leaf in leaves(shapes) if isinstance(leaf, Tensor)):
            return func(*args, **kwargs)
        return self._recorded(func, args, kwargs, [])

    def _computed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call that is made at once, on values."""
        if any(tensor.is_meta for tensor in _written(func, args, kwargs)):
            raise Unrecordable(f"{func} can't be recorded while a network is built")
        replay = Replay()

        def real(leaf: Any) -> Any:
            return self._real(leaf, replay) if isinstance(leaf, Tensor) else leaf

        return func(*mapped(real, args), **mapped(real, kwargs))

    def _recorded(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], written: list[Tensor]
    ) -> Any:
        """A call that is written down."""
        if func._schema.name in ("aten::set_", "aten::resize_"):
            raise Unrecordable(f"{func} can't be recorded while a network is built")
        made = "device" in kwargs or not any(isinstance(leaf, Tensor) for leaf in leaves((args, kwargs)))
        try:
            result = func(*_on_meta(args), **_on_meta(kwargs, made))
        except NotImplementedError:
            return self._computed(func, args, kwargs)
        call = self._call(func, args, kwargs, written)
        for tensor in written:
            self._changed(tensor, call)
        if not written:
            for number, tensor in enumerate(leaf for leaf in leaves(result) if isinstance(leaf, Tensor)):
                self._made(tensor, call, number)
        return result

    def _large(self, tensor: Tensor) -> bool:
        return tensor.layout is torch.strided and tensor.untyped_storage().nbytes() >= self._bytes

    def _made(self, tensor: Tensor, call: Call, number: int) -> None:
        storage = tensor.untyped_storage()
        if storage in self._histories:  # a view
            return
        history = self._histories[storage] = History(storage.nbytes())
        history.changes.append(Change(call, (number, Read.of(tensor, history)), overwrites=True))
        self.recorded += history.nbytes

    def _changed(self, tensor: Tensor, call: Call) -> None:
        history = self._histories[tensor.untyped_storage()]
        reads = [leaf for leaf in leaves((call.args, call.kwargs)) if isinstance(leaf, Read)]
        whole = tensor.is_contiguous() and tensor.numel() * tensor.itemsize == history.nbytes
        alone = sum(read.history is history for read in reads) == 1
        overwrites = whole and alone and call.function._schema.name in OVERWRITING  # type: ignore[attr-defined]
        history.changes.append(Change(call, None, overwrites))

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], written: list[Tensor]) -> Call:
        state = None
        changed = {id(tensor) for tensor in written}
        random = torch.Tag.nondeterministic_seeded in func.tags and not _without_dropout(func, args, kwargs)
        if random:
            state = torch.get_rng_state()

        def noted(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                history = self.history(leaf)
                if history is not None:
                    return Read.of(leaf, history, id(leaf) in changed)
                return self._constant(leaf)
            if isinstance(leaf, torch.Generator):
                return Drawn(leaf.get_state())
            return _CPU if leaf == _META else leaf

        call = Call(func, mapped(noted, args), mapped(noted, kwargs), state)
        if random:
            self._draw(func, args, kwargs)
        return call

    def _draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Move the generator as the call would have."""
        replay, unread = Replay(), func._schema.name in OVERWRITING

        def real(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                if leaf is args[0] and unread:
                    return torch.empty_strided(leaf.size(), leaf.stride(), dtype=leaf.dtype)
                return self._real(leaf, replay).clone()
            return _CPU if leaf == _META else leaf

        drawn = func(*mapped(real, args), **mapped(real, kwargs))
        nbytes = sum(leaf.nbytes for leaf in leaves(drawn) if isinstance(leaf, Tensor))
        del drawn
        self.heap.freed(nbytes)

    def _constant(self, tensor: Tensor) -> Constant:
        tensor = tensor.detach()
        if not self._large(tensor):
            return Constant(tensor.clone(), 0)
        if _in_a_file(tensor):
            self.mapped += tensor.nbytes
        else:
            self.kept += tensor.nbytes
            tensor = tensor.clone()
        return Constant(tensor, tensor._version)

    def _real(self, tensor: Tensor, replay: Replay) -> Tensor:
        if not tensor.is_meta:
            return tensor
        history = self.history(tensor)
        if history is None:
            raise Unrecordable(
                f"a tensor of shape {tuple(tensor.shape)} was made on the device meta: no values"
            )
        return replay.tensor(Read.of(tensor, history))


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call changes."""
    found = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[number] if number < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in leaves(given) if isinstance(leaf, Tensor)]
    return found


def _without_dropout(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a function would draw random numbers for dropout, and has none to do."""
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return "dropout_p" in names and not given.get("dropout_p", 0.0)


def _in_a_file(tensor: Tensor) -> bool:
    """Whether a tensor on the CPU is part of a file that is mapped into memory; where that can't be told, it is not."""
    maps = Path("/proc/self/maps")
    for line in maps.read_text().splitlines() if maps.exists() else ():
        addresses, _, _, _, inode, *_ = line.split()
        begin, end = (int(address, 16) for address in addresses.split("-"))
        if begin <= tensor.data_ptr() < end:
            return inode != "0"
    return False


def _asks(func: Any) -> bool:
    """Whether a function returns numbers, for which values are needed."""
    return any(str(output.type) not in ("Tensor", "List[Tensor]") for output in func._schema.returns)


def _on_meta(tree: Any, made: bool = False) -> Any:
    """Arguments without values; with the device for what is ``made`` from them."""

    def blank(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and not leaf.is_meta:
            return torch.empty_strided(leaf.size(), leaf.stride(), dtype=leaf.dtype, device=_META)
        return leaf

    tree = mapped(blank, tree)
    return {**tree, "device": _META} if made else tree
