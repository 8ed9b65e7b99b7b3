"""Tensors that are cut into equal slices over ranks, and whole only while they are used.

A tensor's object never changes: between uses its ``data`` is this rank's slice, a vector; in use it is the whole.
What treats elements one by one (averages of weights, penalties) therefore runs on slices as it runs on whole tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from framework.engines.host_copy import Pending


class ShardRanks:
    """Ranks that have one slice each, and the ranks elsewhere that have the same one.

    Args:
        mesh: (replicas, shards).

    Attributes:
        size: slices of a tensor.
        number: of this rank's slice.
        group: the ranks that have the others.
        ranks: all of them.
        first: whether this rank is of the first replica.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self._copies, self.size = mesh.shape
        self.number = mesh.get_local_rank(1)
        self._same, self.group = mesh.get_group(0), mesh.get_group(1)
        self.ranks = mesh.size()
        self.first = mesh.get_local_rank(0) == 0

    def gather(self, whole: Tensor, part: Tensor) -> Pending | None:
        """Start to put every rank's ``part`` (n,) together in ``whole`` (size * n,)."""
        return dist.all_gather_into_tensor(whole, part, group=self.group, async_op=True)

    def sum_slice(self, part: Tensor, whole: Tensor) -> Pending | None:
        """Start to sum ``whole`` (size * n,) over the ranks of the group; ``part`` (n,) gets this rank's slice."""
        return dist.reduce_scatter_tensor(part, whole, group=self.group, async_op=True)

    def sum_copies(self, part: Tensor) -> Pending | None:
        """Start to sum ``part`` over the ranks that have the same slice."""
        if self._copies == 1:
            return None
        return dist.all_reduce(part, group=self._same, async_op=True)

    def total(self, part: Tensor) -> Tensor:
        """Sum over the slices."""
        whole = part.clone()
        dist.all_reduce(whole, group=self.group)
        return whole


class Slices:
    """Tensors of one type that become whole together.

    Args:
        tensors: of one type, whole; they become slices.
        ranks: that share them.

    Attributes:
        flat: this rank's slices, one behind the other, each padded with zeros to the same length on all ranks.
        places: by tensor, where its slice begins in ``flat``.
        widths: by tensor, the length of its slice.
    """

    def __init__(self, tensors: Sequence[Tensor], ranks: ShardRanks) -> None:
        self._ranks = ranks
        self._shapes = {tensor: tensor.shape for tensor in tensors}
        self.widths = {t: -(-t.numel() // ranks.size) for t in tensors}
        ends = list(accumulate(self.widths.values()))
        self.places = {t: end - width for (t, width), end in zip(self.widths.items(), ends, strict=True)}
        like = tensors[0]
        self.flat = torch.zeros(ends[-1], dtype=like.dtype, device=like.device)
        for tensor in tensors:
            self.write(tensor, tensor.detach())
        sizes = [tensor.numel() for tensor in tensors]
        self._whole = torch.empty(sum(sizes), dtype=like.dtype, device=like.device)
        pieces = self._whole.split(sizes)
        self._views = {t: piece.view(t.shape) for t, piece in zip(tensors, pieces, strict=True)}
        self._gathered: Tensor | None = None
        self._gathering: Pending | None = None
        self.present = True
        self.release()

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
            self._gathered = self.flat.new_empty(self._ranks.size * self.flat.numel())
            self._gathering = self._ranks.gather(self._gathered, self.flat)

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
        part = self.of(tensor, flat).contiguous()
        gathered = part.new_empty(self._ranks.size * part.numel())
        if (pending := self._ranks.gather(gathered, part)) is not None:
            pending.wait()
        return gathered[: self._shapes[tensor].numel()].view(self._shapes[tensor])

    def write(self, tensor: Tensor, whole: Tensor, flat: Tensor | None = None) -> None:
        """Overwrite this rank's slice with that of a whole tensor, which every rank has; sends nothing."""
        width, begin = self.widths[tensor], self._ranks.number * self.widths[tensor]
        found = whole.reshape(-1)[begin : begin + width]
        self.of(tensor, flat)[: found.numel()].copy_(found)


class SliceGradients:
    """Gradients of the first tensors of ``Slices``, whole until they are summed over the ranks, as slices.

    Args:
        slices: theirs.
        parameters: the first of its tensors.
        ranks: as in ``Slices``.
    """

    def __init__(self, slices: Slices, parameters: Sequence[nn.Parameter], ranks: ShardRanks) -> None:
        self._slices, self._parameters, self._ranks = slices, parameters, ranks
        self._width = sum(slices.widths[p] for p in parameters)
        self._missing = len(parameters)
        self._whole: Tensor | None = None  # (ranks, width)
        self._sum: Tensor | None = None  # (width,)
        self._pending: Pending | None = None

    def add(self, gradients: Mapping[nn.Parameter, Tensor], factor: float) -> bool:
        """Take in gradients of a micro-batch, times a factor; whether all of them are here now."""
        if self._whole is None:
            self._whole = self._slices.flat.new_zeros(self._ranks.size, self._width)
        for parameter, gradient in gradients.items():
            self._add(parameter, gradient.reshape(-1), factor)
        self._missing = (self._missing or len(self._parameters)) - len(gradients)
        return not self._missing

    def _add(self, parameter: nn.Parameter, gradient: Tensor, factor: float) -> None:
        assert self._whole is not None
        place, width = self._slices.places[parameter], self._slices.widths[parameter]
        rows = self._whole.narrow(1, place, width)
        full = gradient.numel() // width
        rows[:full].add_(gradient[: full * width].view(full, width), alpha=factor)
        if rest := gradient.numel() - full * width:
            rows[full, :rest].add_(gradient[full * width :], alpha=factor)

    @property
    def travelling(self) -> bool:
        """Whether ``start`` was called, and ``finish`` not yet."""
        return self._sum is not None

    def start(self) -> None:
        """Begin to average over the ranks; collective."""
        assert self._whole is not None
        self._whole.mul_(1 / self._ranks.ranks)
        self._sum = self._whole.new_empty(self._width)
        self._pending = self._ranks.sum_slice(self._sum, self._whole.view(-1))

    def finish(self) -> Tensor:
        """This rank's slices (width,) of the averaged gradients."""
        assert self._sum is not None
        if self._pending is not None:
            self._pending.wait()
        if (copies := self._ranks.sum_copies(self._sum)) is not None:
            copies.wait()
        averaged, self._sum, self._whole, self._pending = self._sum, None, None, None
        return averaged
