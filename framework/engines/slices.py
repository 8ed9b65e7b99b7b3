"""Tensors that are cut into equal slices over ranks, and whole only while they are used.

A tensor's object never changes: between uses its ``data`` is this rank's slice, a vector; in use it is the whole.
What treats elements one by one (averages of weights, penalties) therefore runs on slices as it runs on whole tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from framework.engines.host_copy import Pending
from framework.network.sharded_init import Made, put
from framework.runtime.distributed import device


class ShardRanks:
    """Ranks that have one slice each, and the ranks elsewhere that have the same one.

    Args:
        mesh: (replicas, shards).

    Attributes:
        size: slices of a tensor.
        copies: ranks that have the same slice.
        number: of this rank's slice.
        group: the ranks that have the others.
        ranks: all of them.
        first: whether this rank is of the first replica.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.copies, self.size = mesh.shape
        self.number = mesh.get_local_rank(1)
        self._same, self.group = mesh.get_group(0), mesh.get_group(1)
        self.ranks = mesh.size()
        self.first = mesh.get_local_rank(0) == 0
        # What is sent through a group goes in order: the weights of the first segment would wait for the gradients of
        # the last. So each has a group of its own.
        self._gathers, self._sums = _group_like(mesh), _group_like(mesh)

    def gather(self, whole: Tensor, part: Tensor) -> Pending | None:
        """Start to put every rank's ``part`` (n,) together in ``whole`` (size * n,)."""
        return dist.all_gather_into_tensor(whole, part, group=self._gathers, async_op=True)

    def sum_slice(self, part: Tensor, whole: Tensor) -> Pending | None:
        """Start to sum ``whole`` (size * n,) over the ranks of the group; ``part`` (n,) gets this rank's slice."""
        return dist.reduce_scatter_tensor(part, whole, group=self._sums, async_op=True)

    def sum_copies(self, part: Tensor) -> Pending | None:
        """Start to sum ``part`` over the ranks that have the same slice."""
        if self.copies == 1:
            return None
        return dist.all_reduce(part, group=self._same, async_op=True)

    def close(self) -> None:
        """Free the groups, which have threads."""
        for group in (self._gathers, self._sums):
            dist.destroy_process_group(group)

    def total(self, part: Tensor) -> Tensor:
        """Sum over the slices; stays where ``part`` is."""
        whole = part.to(device(), copy=True)
        dist.all_reduce(whole, group=self.group)
        return whole.to(part.device)


def _group_like(mesh: DeviceMesh) -> dist.ProcessGroup:
    """Another group of the ranks that share slices with this one; collective."""
    groups = [dist.new_group(ranks) for ranks in mesh.mesh.tolist()]
    own = groups[mesh.get_local_rank(0)]
    assert isinstance(own, dist.ProcessGroup)  # -100 where this rank is no member
    return own


class Home(NamedTuple):
    """How slices are kept, and what travels.

    Attributes:
        made: has the slices of tensors without memory.
        device: where slices are; the host's memory, or where they are used.
        gathered: type in which weights of two dimensions and more are gathered and used; ``None`` for their own.
        reduced: type in which gradients are summed over ranks; ``None`` for their own.
    """

    made: Made | None
    device: torch.device
    gathered: torch.dtype | None = None
    reduced: torch.dtype | None = None


class Slices:
    """Tensors of one type that become whole together.

    Args:
        tensors: of one type, whole or without memory; they become slices.
        ranks: that share them.
        home: where they are kept, and who has those without memory.
        gathered: type in which they are gathered and used; ``None`` for their own.

    Attributes:
        flat: this rank's slices, one behind the other, each padded with zeros to the same length on all ranks.
        places: by tensor, where its slice begins in ``flat``.
        widths: by tensor, the length of its slice.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        ranks: ShardRanks,
        home: Home,
        gathered: torch.dtype | None = None,
    ) -> None:
        self._ranks = ranks
        self._shapes = {tensor: tensor.shape for tensor in tensors}
        self.widths = {t: -(-t.numel() // ranks.size) for t in tensors}
        ends = list(accumulate(self.widths.values()))
        self.places = {t: end - width for (t, width), end in zip(self.widths.items(), ends, strict=True)}
        like, kind = tensors[0], gathered or tensors[0].dtype
        used_on = device()
        pinned = home.device.type == "cpu" and used_on.type == "cuda"
        self.flat = torch.zeros(ends[-1], dtype=like.dtype, device=home.device, pin_memory=pinned)
        for tensor in tensors:
            if tensor.is_meta:
                assert home.made is not None
                self.of(tensor).copy_(home.made.slice_of(tensor))
                put(tensor, self.of(tensor))
            else:
                self.write(tensor, tensor.detach())
        sizes = [shape.numel() for shape in self._shapes.values()]
        self._whole = torch.empty(sum(sizes), dtype=kind, device=used_on)
        pieces = self._whole.split(sizes)
        self._views = {t: piece.view(s) for (t, s), piece in zip(self._shapes.items(), pieces, strict=True)}
        self._gathered: Tensor | None = None
        self._gathering: Pending | None = None
        self.present = True
        self.release()

    @property
    def place(self) -> torch.device:
        """Where the tensors are when they are whole."""
        return self._whole.device

    @property
    def tensors(self) -> list[Tensor]:
        """In their order in ``flat``."""
        return list(self._shapes)

    @property
    def coming(self) -> bool:
        """Whether the tensors are being gathered."""
        return self._gathered is not None

    def shape(self, tensor: Tensor) -> torch.Size:
        """Of the whole."""
        return self._shapes[tensor]

    def of(self, tensor: Tensor, flat: Tensor | None = None) -> Tensor:
        """This rank's slice, in ``flat`` or in another vector laid out like it."""
        return (self.flat if flat is None else flat).narrow(0, self.places[tensor], self.widths[tensor])

    def part(self, tensor: Tensor, flat: Tensor | None = None) -> Tensor:
        """``of`` without the zeros behind it: the parts of all ranks, one behind the other, are the whole.

        Of a single rank it has the whole's shape.
        """
        begin = self._ranks.number * self.widths[tensor]
        part = self.of(tensor, flat)[: max(0, self._shapes[tensor].numel() - begin)]
        return part.view(self._shapes[tensor]) if self._ranks.size == 1 else part

    def start(self) -> None:
        """Begin to gather, unless that has begun or is done; collective."""
        if not self.present and self._gathered is None:
            part = self.flat.to(self._whole, non_blocking=True)
            self._gathered = part.new_empty(self._ranks.size * part.numel())
            self._gathering = self._ranks.gather(self._gathered, part)

    def finish(self) -> None:
        """Wait for what ``start`` began; the tensors are whole from now on."""
        if self._gathered is None:
            return
        if self._gathering is not None:
            self._gathering.wait()
        gathered, self._gathered, self._gathering = self._gathered, None, None
        # The same storage each time: graphs keep views of weights, from before a release to after the next gathering.
        self._whole.untyped_storage().resize_(self._whole.numel() * self._whole.element_size())
        rows = gathered.view(self._ranks.size, -1)
        for tensor, view in self._views.items():
            slices = rows.narrow(1, self.places[tensor], self.widths[tensor])
            view.view(-1).copy_(slices.reshape(-1)[: view.numel()])
            tensor.data = view
        self.present = True

    def release(self) -> None:
        """Leave this rank's slices in the place of the whole tensors."""
        self.finish()
        for tensor in self._shapes:
            tensor.data = self.of(tensor)
        self._whole.untyped_storage().resize_(0)
        self.present = False

    def whole(self, tensor: Tensor, flat: Tensor | None = None) -> Tensor:
        """A copy of a whole tensor, or of what lies at its place in the vectors ``flat`` of all ranks; collective."""
        part = self.of(tensor, flat).to(self._whole.device).contiguous()
        gathered = part.new_empty(self._ranks.size * part.numel())
        if (pending := self._ranks.gather(gathered, part)) is not None:
            pending.wait()
        return gathered[: self._shapes[tensor].numel()].view(self._shapes[tensor])

    def write(self, tensor: Tensor, whole: Tensor, flat: Tensor | None = None) -> None:
        """Overwrite this rank's slice with that of a whole tensor, which every rank has; sends nothing."""
        width, begin = self.widths[tensor], self._ranks.number * self.widths[tensor]
        found = whole.reshape(-1)[begin : begin + width]
        self.of(tensor, flat)[: found.numel()].copy_(found)
