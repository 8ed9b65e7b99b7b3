"""What the options of every method share, and what they say about how a plan is executed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Execution:
    """What executes a plan.

    Attributes:
        kind: "synchronous": every segment runs once a step, on the output of the segment below. "replay buffer":
            every segment draws its input from a buffer of the latest outputs of the segment below. "one module at a
            time": one segment trains, on top of those below it, which stay as they are. "top first": all segments
            run, and then the heads from the last segment to the first.
        buffer_size: batches in a replay buffer.
        buffer_order: order in which the segments run with replay buffers: a new random one every step, or from the
            first to the last.
        module: the segment that trains in this run, of "one module at a time"; ``None`` stands for as many runs as
            there are segments.
    """

    kind: Literal["synchronous", "replay buffer", "one module at a time", "top first"] = "synchronous"
    buffer_size: int = 30
    buffer_order: Literal["random", "sequence"] = "random"
    module: int | None = None


SYNCHRONOUS = Execution()


class MethodOptions:
    """Base class of a method's ``Options``, which is a dataclass; one without the base gets it when it is loaded.

    Fields of ``Options`` are keys of the recipe's ``method:`` section.
    """

    @property
    def execution(self) -> Execution:
        """What is to execute the plan."""
        return SYNCHRONOUS

    def check(self) -> None:
        """Check what no single field can show.

        Raises:
            Fault: two fields contradict each other; names one of them by its key in a recipe, ``method.<field>``.
        """
