"""Local units and plans: the one abstraction that every method is written in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor, nn

from framework.config.method_options import Execution, MethodOptions
from framework.config.schema import Fault, NonNegativeInt, PositiveInt
from framework.network import Segment, Shape
from framework.runtime.errors import UserError

Window = tuple[int, int]


@dataclass(frozen=True)
class Task:
    """What a method may know when it plans.

    Attributes:
        segments: in order; a head may copy their blocks.
        shapes: channels, height and width at every segment's output.
        image: those of the images.
        mean: subtracted from the channels of the images, of values in [0, 1].
        std: what the channels were divided by.
        num_classes: classes of a supervised task, 0 without labels.
    """

    segments: tuple[Segment, ...]
    shapes: tuple[Shape, ...]
    image: Shape
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int = 0

    def __len__(self) -> int:
        return len(self.shapes)

    @property
    def names(self) -> tuple[str, ...]:
        """The segments' names."""
        return tuple(segment.name for segment in self.segments)


class ReadingHead(nn.Module):
    """A head that looks at the weights of segments, besides its input.

    The network runs the hooks during its forward pass, when weights are whole under every engine.

    Attributes:
        reads: the segments whose weights it looks at.
        when: its copies follow with the weights before the optimizer step, or after it.
        may_be_late: copies that follow "before" the step end up the same if they do so before the next forward.
    """

    reads: tuple[int, ...] = ()
    when: Literal["before", "after"] = "before"
    may_be_late = True

    def read_parameters(self, segments: Sequence[Segment]) -> list[nn.Parameter]:
        """The weights that it looks at; fewer than all of ``reads`` cost a pipeline fewer bytes."""
        return [parameter for s in self.reads for parameter in segments[s].parameters()]

    def penalty(self, segments: Sequence[Segment]) -> Tensor | None:
        """Scalar that is added to the loss as it is: a function of weights, which all get its gradient."""
        return None

    def update_copies(self, segments: Sequence[Segment], amount: Tensor | float) -> None:
        """Move copies towards the segments' weights, once an optimizer step.

        Args:
            segments: all of the network's.
            amount: 1, or 0 where the step is skipped. A tensor where that is decided on the device (float16,
                ``faults.nonfinite=skip``), so that nothing waits for it.
        """


@dataclass(frozen=True, eq=False)
class LocalUnit:
    """A window of segments with a head on top: its loss trains the head and the window, nothing below.

    Attributes:
        name: what metrics and tables call the unit.
        first: lowest segment of the window; below it lies a gradient boundary.
        last: highest segment of the window, whose output the head reads.
        head: auxiliary network and objective, ``head(x_NCHW, batch) -> scalar loss``. Units that end at
            the same segment may share one head object; it then runs once.
        weight: factor of the loss.
        trains: segments of the window whose weights learn from this unit; the others only pass the
            gradient down. ``None`` means all of them.
    """

    name: str
    first: int
    last: int
    head: nn.Module
    weight: float = 1.0
    trains: frozenset[int] | None = None

    @property
    def learns(self) -> frozenset[int]:
        """Segments whose weights learn from this unit."""
        return frozenset(range(self.first, self.last + 1)) if self.trains is None else self.trains


@dataclass(kw_only=True)
class Asynchronous(MethodOptions):
    """Options of methods whose modules need not wait for each other (DGL, InfoPro).

    Attributes:
        async_mode: "buffer": every module draws its input from a ring of what its predecessor has put there (DGL).
            "sequential": module by module, each for the whole schedule on the frozen lower ones (InfoPro).
        buffer_size: batches in a ring, 30 in DGL's example; each holds activations, images and labels.
        buffer_order: of the modules' turns: a new random one every time, or from the bottom up.
        module: number of the one that a sequential run trains; ``None`` lets ``train.py`` run them all.
    """

    async_mode: Literal["none", "sequential", "buffer"] = "none"
    buffer_size: PositiveInt = 30
    buffer_order: Literal["random", "sequence"] = "random"
    module: NonNegativeInt | None = None

    @property
    def execution(self) -> Execution:
        """As ``async_mode`` says."""
        if self.async_mode == "buffer":
            return Execution("replay buffer", self.buffer_size, self.buffer_order)
        if self.async_mode == "sequential":
            return Execution("one module at a time", module=self.module)
        return Execution()

    def check(self) -> None:
        """A module trains alone only where they are trained one after the other."""
        if self.module is not None and self.async_mode != "sequential":
            raise Fault("method.module", self.module, "goes with method.async_mode=sequential")


@dataclass(frozen=True, eq=False)
class Plan:
    """Local units over a list of segments.

    Attributes:
        units: the units; order matters only where two end at the same segment.
        segments: number of segments in the network.
        views: augmented views of an image that the heads expect side by side in a batch.
        supervised: whether the heads need labels (and the last one predicts classes).
        asynchronous: whether modules wait for each other.

    Raises:
        UserError: a window outside the network, a weight that is not positive, a unit that trains a segment
            outside its window, a head that reads a segment which the network lacks, a segment that no unit
            trains, two units of one name, or asynchronous modules of which several are in one window.
    """

    units: tuple[LocalUnit, ...]
    segments: int
    views: int = 1
    supervised: bool = False
    asynchronous: Asynchronous = field(default_factory=Asynchronous)

    def __post_init__(self) -> None:
        for unit in self.units:
            if not 0 <= unit.first <= unit.last < self.segments:
                raise UserError(
                    f"unit {unit.name}: window [{unit.first}..{unit.last}] lies outside the network's segments "
                    f"0..{self.segments - 1}"
                )
            if not unit.weight > 0:
                raise UserError(f"unit {unit.name}: weight {unit.weight} must be above 0")
            if outside := unit.learns - set(range(unit.first, unit.last + 1)):
                raise UserError(
                    f"unit {unit.name}: segment {min(outside)} is outside its window [{unit.first}..{unit.last}]"
                )
            reads = unit.head.reads if isinstance(unit.head, ReadingHead) else ()
            if lacking := set(reads) - set(range(self.segments)):
                raise UserError(
                    f"unit {unit.name}: its head reads segment {max(lacking)}, and the network has segments "
                    f"0..{self.segments - 1}"
                )
        learned = {s for unit in self.units for s in unit.learns}
        if missing := set(range(self.segments)) - learned:
            raise UserError(f"no unit trains segment {min(missing)} of 0..{self.segments - 1}")
        names = [unit.name for unit in self.units]
        if twice := {n for n in names if names.count(n) > 1}:
            raise UserError(f"two units are called {min(twice)}")
        mode = self.asynchronous.async_mode
        if mode != "none" and [(u.first, u.last) for u in self.units] != [
            (s, s) for s in range(self.segments)
        ]:
            raise UserError(f"method.async_mode={mode}: only where every module has a unit of its own")

    def only(self, module: int) -> Plan:
        """The plan of a network that is this module alone.

        Raises:
            UserError: there is no such module.
        """
        if module >= self.segments:
            raise UserError(f"method.module={module}: the network has modules 0 to {self.segments - 1}")
        return replace(self, units=(replace(self.units[module], first=0, last=0),), segments=1)


def sliding_windows(segments: int, window: int) -> list[Window]:
    """All windows ``(first, last)`` of a length, in order.

    Raises:
        UserError: the window is longer than the network.
    """
    if not 1 <= window <= segments:
        raise UserError(
            f"method.window={window}: the network has {segments} segments, so 1 to {segments} are possible"
        )
    return [(last - window + 1, last) for last in range(window - 1, segments)]


def weigh(
    units: Sequence[LocalUnit], weights: Sequence[float], reduce: Literal["sum", "mean"]
) -> tuple[LocalUnit, ...]:
    """The units with these weights, all 1 where none are given; for "mean" over their number.

    Raises:
        UserError: not as many weights as units.
    """
    if weights and len(weights) != len(units):
        raise UserError(
            f"method.unit_loss_weights: {len(weights)} weights for the {len(units)} units "
            f"{', '.join(unit.name for unit in units)}"
        )
    scale = 1 / len(units) if reduce == "mean" else 1.0
    each = weights or [1.0] * len(units)
    return tuple(replace(unit, weight=w * scale) for unit, w in zip(units, each, strict=True))
