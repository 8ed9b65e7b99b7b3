"""What a teacher adds to the memory of a step: its weights, and the output of one segment."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from framework.data.batch import Batch
from framework.execution import LocalNetwork
from framework.local.heads import Projection
from framework.local.methods import loco
from framework.model import local_network

IMAGES, SIZE = 8, 32


class LiveTensors(TorchDispatchMode):
    """Inside ``with``, counts the bytes of all tensors that operations make, for as long as anything refers to them."""

    def __init__(self, there: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._live = {tensor.untyped_storage()._cdata for tensor in there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._hold(tensor.untyped_storage())
        return found

    def _hold(self, storage: UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._live:
            self._live.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.now -= size


def peak(objective: Any) -> tuple[int, LocalNetwork]:
    """Most bytes at once during a step in which the teacher moves, too; and the network."""
    sizes = {"layers": 2, "proj_bn": "hidden", "proj_hidden": 16, "dim": 8, "pred_hidden": 8, "queue": IMAGES}
    head = Projection(objective=objective, conv_blocks=1, momentum_schedule="constant", **sizes)  # type: ignore[arg-type]
    torch.manual_seed(0)
    net = local_network("resnet14", "loco", loco.Options(head=head), image_size=SIZE).train()
    batch = Batch(torch.randn(2 * IMAGES, 3, SIZE, SIZE), None, 2)
    net(batch).loss.backward()
    net.zero_grad()
    with LiveTensors([*net.parameters(), *net.buffers(), batch.images]) as live:
        net(batch).loss.backward()
    return live.peak, net


@pytest.mark.parametrize("objective", ["byol", "mocov3"])
def test_a_teacher_holds_the_output_of_one_segment(objective: str) -> None:
    """Beside LoCo's step under InfoNCE, with the same projector."""
    plain, _ = peak("infonce")
    found, net = peak(objective)
    features = 4 * 2 * IMAGES * 16 * SIZE * SIZE  # of the first segment, the largest
    embeddings = 4 * 2 * IMAGES * 8
    assert 0 < found - plain <= features + 4 * embeddings
    assert net.teacher is not None
    weights = [p for unit in net.plan.units for p in unit.head.trunk.parameters()]  # type: ignore[union-attr,operator]
    weights += [p for segment in net.segments for p in segment.parameters()]
    averages = [average for s in range(len(net.segments)) for average in net.teacher.averages(s)]
    assert sum(a.numel() for a in averages) == sum(p.numel() for p in weights)


def test_with_one_view_for_each_side_a_step_takes_about_half() -> None:
    assert peak("moco")[0] < 0.6 * peak("infonce")[0]
