"""Tensors on the device ``meta``, on which the host can read nothing.

``meta`` refuses most reads itself: ``item``, ``tolist``, ``bool``, ``nonzero`` and whatever has a shape that depends on
values. ``NoHostReads`` refuses the rest of what makes the host wait for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}


class NoHostReads(TorchDispatchMode):
    """Fails at a read of the device by the host, and at a copy from the host to the device.

    ``torch.tensor([1.0], device="cuda")``, ``new_tensor``, ``x[[0, 1]]`` and ``.to("cuda")`` copy from pageable memory
    and wait until that is done (``at::cuda::memcpy_and_sync``), so ``torch.cuda.set_sync_debug_mode`` raises. With
    ``non_blocking=True`` it says nothing, but CUDA itself may wait for the stream before it stages pageable memory
    ("API synchronization behavior" in its manual), so a step has none of these either. Scalars of the CPU are arguments
    of an element-wise kernel, and may be there.

    Args:
        uploads: allow copies with ``non_blocking=True``, as the loader makes them on a stream of its own.
    """

    def __init__(self, uploads: bool = False) -> None:
        super().__init__()
        self._uploads = uploads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_host = [tensor for tensor in tensors if not tensor.is_meta]
        if func is torch.ops.aten.lift_fresh.default and len(on_host) < len(tensors):
            raise AssertionError("a tensor was made on the device from numbers of the host")
        if on_host and len(on_host) < len(tensors):
            scalars = all(tensor.ndim == 0 for tensor in on_host)
            if not (scalars and torch.Tag.pointwise in func.tags) or func in COPIES:
                raise AssertionError(f"{func} of tensors on the host and on the device")
        result = func(*args, **kwargs)
        found = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        waits = not (self._uploads and kwargs.get("non_blocking"))
        if func in COPIES and on_host and waits and any(tensor.is_meta for tensor in found):
            raise AssertionError(f"{func} from the host to the device")
        return result


class _Autocast(torch.autocast):
    """Of the CPU where there is none of ``meta``; tensors on ``meta`` keep their types."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "meta" else device_type, *args, **kwargs)


def _of_the_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: function(*("cpu" if arg == "meta" else arg for arg in args))


class _Generator:
    """Of ``meta``, where PyTorch has none and random numbers have no values: the seed is made all the same."""

    def __init__(self, device: torch.device) -> None:
        assert device.type == "meta", f"random numbers on {device}"

    def manual_seed(self, seed: int) -> None:
        assert seed >= 0


@contextmanager
def no_host_reads(uploads: bool = False) -> Iterator[None]:
    """Within the context, whatever makes the host wait for ``meta`` raises; see ``NoHostReads``."""
    with pytest.MonkeyPatch.context() as patch, NoHostReads(uploads):
        patch.setattr(torch, "autocast", _Autocast)
        patch.setattr(torch, "Generator", _Generator)
        for name in ("is_autocast_enabled", "get_autocast_dtype"):
            patch.setattr(torch, name, _of_the_cpu(getattr(torch, name)))
        yield
