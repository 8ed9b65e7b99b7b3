"""Local units and plans: the one abstraction that every method is written in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from framework.config.method_options import SYNCHRONOUS, Execution
from framework.local.averaging import Averaging
from framework.local.masking import Masking
from framework.local.needs import NOT_PROVIDED, Need
from framework.runtime.errors import UserError

if TYPE_CHECKING:
    from framework.local.blocks import Block
    from framework.local.head import Head
    from framework.network import Segment, Shape

Window = tuple[int, int]


@dataclass(frozen=True)
class NetworkInfo:
    """The network and the data set, as far as a method needs to know them for its plan.

    Attributes:
        segments: in forward order; a head may copy their blocks.
        shapes: of every segment's output (channels, height, width).
        outputs: of the same in the network's own layout, (tokens, channels) for instance.
        image: shape of the images.
        mean: subtracted from the images' channels, whose values lie in [0, 1].
        std: what the channels were then divided by.
        num_classes: number of classes, 0 without labels.
        label_smoothing: of every cross entropy.
    """

    segments: tuple[Segment, ...]
    shapes: tuple[Shape, ...]
    outputs: tuple[tuple[int, ...], ...]
    image: Shape
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int = 0
    label_smoothing: float = 0.0

    @classmethod
    def of(
        cls,
        segments: Sequence[Segment],
        image_size: int,
        num_classes: int = 0,
        mean: tuple[float, ...] = (0.0, 0.0, 0.0),
        std: tuple[float, ...] = (1.0, 1.0, 1.0),
        label_smoothing: float = 0.0,
    ) -> NetworkInfo:
        """Of these segments on square images with a side of ``image_size`` pixels; runs one image.

        Raises:
            UserError: the image is too small for the network, or not of the one size that it takes.
        """
        from framework.network import Shape, outputs

        found = outputs(segments, image_size)
        shapes = tuple(shape for shape, _ in found)
        own = tuple(output for _, output in found)
        image = Shape(3, image_size, image_size)
        return cls(tuple(segments), shapes, own, image, mean, std, num_classes, label_smoothing)

    def __len__(self) -> int:
        """Number of segments."""
        return len(self.shapes)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the segments."""
        return tuple(segment.name for segment in self.segments)

    def pooling(self, segment: int) -> tuple[int, tuple[str, ...]] | None:
        """See ``network.pooling.own_pooling``."""
        from framework.network.pooling import own_pooling

        return own_pooling(self.segments[segment], self.outputs[segment])

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks of the network, in order, each with the number of its segment."""
        from framework.local.blocks import blocks_of

        return blocks_of(self.segments)


@dataclass(frozen=True, eq=False)
class LocalUnit:
    """A window of segments with a head on top: its loss trains the head and the window, and nothing below.

    Attributes:
        name: of the unit, in metrics and tables.
        first: lowest segment of the window; the gradient ends at its input.
        last: highest segment of the window, whose output the head reads.
        head: auxiliary network and objective. Several units may share one head: on the same segment it runs once for
            all of them, on different segments its gradient is the sum.
        weight: factor of the loss.
        trains: segments of the window whose weights learn from this unit; the others only pass the
            gradient down. ``None`` means all of them.
    """

    name: str
    first: int
    last: int
    head: Head
    weight: float = 1.0
    trains: frozenset[int] | None = None

    @property
    def learns(self) -> frozenset[int]:
        """Segments whose weights learn from this unit."""
        return frozenset(range(self.first, self.last + 1)) if self.trains is None else self.trains


@dataclass(frozen=True, eq=False)
class Plan:
    """Local units over a list of segments.

    Attributes:
        units: the units; their order matters only where two end at the same segment.
        segments: number of segments in the network.
        views: augmented views of an image that the heads expect in a batch.
        execution: what executes the plan.
        teacher: how the teacher follows, where heads need one.
        feedback: what carries errors down through the layers of segments and heads: their own weights ("exact"), fixed
            random ones, or the signs of their own.
        noise: on the outputs of all segments in training, as a fraction of their standard deviation.
        masking: patches that are dropped behind the first segment, in training.

    Raises:
        UserError: a window outside the network, a weight that is not positive, a unit that trains a segment
            outside its window, a head that reads a segment which the network lacks or needs what nothing provides, a
            segment that no unit trains, two units of one name, or an execution that only serves modules which each
            have a unit and a head of their own.
    """

    units: tuple[LocalUnit, ...]
    segments: int
    views: int = 1
    execution: Execution = SYNCHRONOUS
    teacher: Averaging | None = None
    noise: float = 0.0
    masking: Masking | None = None
    feedback: Literal["exact", "random", "sign"] = "exact"

    def __post_init__(self) -> None:
        for unit in self.units:
            self._check_unit(unit)
        learned = {s for unit in self.units for s in unit.learns}
        if missing := set(range(self.segments)) - learned:
            raise UserError(f"no unit trains segment {min(missing)} of 0..{self.segments - 1}")
        names = [unit.name for unit in self.units]
        if twice := {n for n in names if names.count(n) > 1}:
            raise UserError(f"two units are called {min(twice)}; LocalUnit(name, ...) must differ")
        windows = [(unit.first, unit.last) for unit in self.units]
        own = windows == [(s, s) for s in range(self.segments)] and len(self.heads) == len(self.units)
        if self.teacher is not None and self.execution.kind != "synchronous":
            raise UserError(f"method.async_mode: no teacher can follow a {self.execution.kind}")
        if self.execution.kind != "synchronous" and not own:
            raise UserError(
                f"method.async_mode: a plan can be executed by {self.execution.kind} only where every module has a "
                "unit and a head of its own"
            )

    def _check_unit(self, unit: LocalUnit) -> None:
        _check_types(unit)
        from framework.local.head import Head  # takes PyTorch, which whoever has a plan has

        if not isinstance(unit.head, Head):
            raise UserError(f"unit {unit.name}: its head is a {type(unit.head).__name__}, must be a Head")
        there = f"the network has segments 0..{self.segments - 1}"
        if not 0 <= unit.first <= unit.last < self.segments:
            raise UserError(f"unit {unit.name}: window [{unit.first}..{unit.last}] does not fit: {there}")
        if not 0 < unit.weight < math.inf:
            raise UserError(f"unit {unit.name}: weight {unit.weight} must be above 0, and finite")
        if outside := unit.learns - set(range(unit.first, unit.last + 1)):
            raise UserError(
                f"unit {unit.name}: segment {min(outside)} is outside its window [{unit.first}..{unit.last}]"
            )
        if lacking := set(unit.head.reads) - set(range(self.segments)):
            raise UserError(f"unit {unit.name}: its head reads segment {max(lacking)}, and {there}")
        if unmet := unit.head.needs & NOT_PROVIDED:
            need = min(need.value for need in unmet)
            raise UserError(f"unit {unit.name}: its head needs {need}, which nothing provides yet")
        if Need.VIEWS in unit.head.needs and self.views < 2:
            raise UserError(
                f"unit {unit.name}: its head needs two views of every image: make the plan with views=2"
            )
        if Need.TEACHER in unit.head.needs and self.teacher is None:
            raise UserError(
                f"unit {unit.name}: its head needs a teacher: make the plan with teacher=Averaging(...)"
            )

    @property
    def heads(self) -> tuple[Head, ...]:
        """Each head once, in the order of the units."""
        return tuple(dict.fromkeys(unit.head for unit in self.units))

    @property
    def needs(self) -> frozenset[Need]:
        """What the heads need, all together."""
        return frozenset().union(*(head.needs for head in self.heads))

    @property
    def supervised(self) -> bool:
        """Whether a head needs labels."""
        return Need.LABELS in self.needs

    @property
    def contrasts(self) -> bool:
        """Whether a loss compares the images of a batch with each other."""
        return any(head.contrasts for head in self.heads)

    @property
    def student_views(self) -> int:
        """Views of an image that the segments see."""
        return 1 if self.teacher is not None and self.teacher.one_sided else self.views

    def only(self, module: int) -> Plan:
        """The plan of a network that is this module alone.

        Raises:
            UserError: there is no such module.
        """
        if module >= self.segments:
            raise UserError(f"method.module={module}: the network has modules 0 to {self.segments - 1}")
        return replace(self, units=(replace(self.units[module], first=0, last=0),), segments=1)


def sliding_windows(segments: int, window: int, clip: bool = False) -> list[Window]:
    """Windows ``(first, last)`` of equal length, each one segment further up than the one before.

    Args:
        segments: number of segments.
        window: length k of the windows in segments.
        clip: ``False``: the ``segments - k + 1`` windows that fit, from ``(0, k-1)`` on, so that none ends at the
            first k-1 segments. ``True``: one window for every segment, ``(max(0, i-k+1), i)``, so that the first
            k-1 are shorter.

    Raises:
        UserError: the window is longer than the network.
    """
    if not 1 <= window <= segments:
        raise UserError(
            f"method.window={window}: the network has {segments} segments, so 1 to {segments} are possible"
        )
    return [(max(0, last - window + 1), last) for last in range(0 if clip else window - 1, segments)]


def weigh(
    units: Sequence[LocalUnit], weights: Sequence[float], reduce: Literal["sum", "mean"]
) -> tuple[LocalUnit, ...]:
    """The units with these weights, all 1 where none are given; "mean" divides each by the number of units.

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


def _check_types(unit: LocalUnit) -> None:
    """Plans are written by hand, and their mistakes show far from there otherwise."""
    if not isinstance(unit, LocalUnit) or not isinstance(unit.name, str) or not unit.name:
        raise UserError(f"a plan's units must be of class LocalUnit, with text as name, and {unit} is not")
    if not isinstance(unit.first, int) or not isinstance(unit.last, int):
        raise UserError(f"unit {unit.name}: first and last must be numbers of segments")
    if not isinstance(unit.weight, int | float):
        raise UserError(f"unit {unit.name}: weight {unit.weight} must be a number")
    if not isinstance(unit.trains, frozenset | set | None):
        raise UserError(f"unit {unit.name}: trains {unit.trains} must be a set of numbers of segments")
