"""Recorded tensors look as if they were on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from framework.network.recorded import computed
from framework.network.recording import Recording
from framework.network.values import leaves

_META, _CPU = torch.device("meta"), torch.device("cpu")

#: what a tensor on the CPU says of its place
_PLACE: dict[Any, Any] = {
    Tensor.device.__get__: _CPU,
    Tensor.is_meta.__get__: False,  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: True,  # type: ignore[attr-defined]
}


class OnTheHost(TorchFunctionMode):
    """While it is active, recorded tensors say that they are on the CPU, as they would be.

    Code asks them where to make others, and some of timm's networks are not initialized on the device ``meta``.
    """

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_function__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._recording.busy:
            return func(*args, **kwargs)
        if func in _PLACE:
            return _PLACE[func] if self._recorded(args[0]) else func(*args)
        if func is computed:
            return args[0].to(_CPU) if self._recorded(args[0]) else args[0]
        if func is Tensor.cpu and self._recorded(args[0]):
            return args[0]
        if func is Tensor.to:
            args, kwargs = self._staying(*args, **kwargs)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and self._recorded(args[0]):
            args = (args[0], _as_tensors(args[1]), *args[2:])
        self._recording.blank = kwargs.get("device") in ("meta", _META) or any(
            isinstance(leaf, Tensor) and leaf.is_meta and not self._recorded(leaf)
            for leaf in leaves((args, kwargs))
        )
        try:
            return func(*args, **kwargs)
        finally:
            self._recording.blank = False

    def _recorded(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and self._recording.history(leaf) is not None

    def _staying(self, tensor: Tensor, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of ``Tensor.to``: from the CPU to the CPU nothing is copied, whether it is recorded or not."""
        own = tensor.device
        if not self._recorded(tensor) and own != _CPU:
            return (tensor, *args), kwargs

        def stays(leaf: Any) -> bool:
            return (
                self._recorded(leaf)
                or (isinstance(leaf, Tensor) and leaf.device == _CPU)
                or leaf in ("cpu", _CPU)
            )

        if args and isinstance(args[0], Tensor) and stays(args[0]):
            args = (own, args[0].dtype, *args[1:])
        if isinstance(other := kwargs.get("other"), Tensor) and stays(other):
            args = (own, other.dtype)
            kwargs = {key: value for key, value in kwargs.items() if key != "other"}
        args = tuple(own if not isinstance(leaf, Tensor) and stays(leaf) else leaf for leaf in args)
        return (tensor, *args), {k: own if k == "device" and stays(v) else v for k, v in kwargs.items()}


def _as_tensors(key: Any) -> Any:
    """An index whose lists and arrays are tensors; PyTorch would make those on the device of what is indexed."""
    if isinstance(key, tuple):
        return tuple(map(_as_tensors, key))
    return torch.as_tensor(key) if isinstance(key, list | np.ndarray) else key
