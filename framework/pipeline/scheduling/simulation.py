"""Run schedules against a simulated clock: how long each stage waits, and whether one waits for ever."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from framework.pipeline.scheduling.placement import Costs
from framework.pipeline.scheduling.schedule import (
    Forward,
    Heads,
    Instruction,
    Layout,
    OptimizerStep,
    ReceiveActivation,
    ReceiveCotangents,
    ReceiveWeights,
    SendActivation,
    SendCotangents,
    SendWeights,
    Walk,
    all_instructions,
)

AHEAD = 2  # activations between two stages that may be sent before the first of them is received
Duration = Callable[[int, Instruction], float]


@dataclass(frozen=True)
class Event:
    """One instruction that was carried out; times in any unit.

    Attributes:
        came: the stage was done with the instruction before.
        start: what it waited for was there.
        end: it was done.
        instruction: what was done.
    """

    came: float
    start: float
    end: float
    instruction: Instruction


@dataclass(frozen=True)
class Simulation:
    """Events by stage, over ``steps`` steps."""

    events: tuple[tuple[Event, ...], ...]
    steps: int

    def period(self) -> float:
        """Time of a step once the pipeline is full: that of the slowest stage over the later half of the steps."""
        return max(self._window(events)[1] for events in self.events) / (self.steps - self.steps // 2)

    def utilization(self) -> list[float]:
        """Share of the time in which each stage works, over the later half of the steps."""
        return [busy / length for busy, length in map(self._window, self.events)]

    def _window(self, events: tuple[Event, ...]) -> tuple[float, float]:
        """(time at work, length) of the later half of the steps."""
        ends = [event.end for event in events if isinstance(event.instruction, OptimizerStep)]
        begin, end = ends[self.steps // 2 - 1], ends[-1]
        busy = sum(event.end - event.start for event in events if begin <= event.start and event.end <= end)
        return busy, end - begin


class Deadlock(Exception):
    """Every stage waits for another; the message names the instruction that each waits at."""


def costs_of(layout: Layout, costs: Costs) -> Duration:
    """A ``Duration`` from costs: messages and the optimizer take no time."""

    def duration(stage: int, instruction: Instruction) -> float:
        if isinstance(instruction, Forward):
            return costs.forward[instruction.segment]
        if isinstance(instruction, Heads):
            return sum(costs.heads[call.number] for call in layout.programs[instruction.segment].heads)
        if isinstance(instruction, Walk):
            return costs.walk(layout.programs[instruction.after], layout.placement.span(stage))
        return 0.0

    return duration


def simulate(layout: Layout, duration: Duration, steps: int | None = None, ahead: int = AHEAD) -> Simulation:
    """Run the schedules of all stages.

    Args:
        layout: of the pipeline.
        duration: of an instruction on a stage.
        steps: how many; by default enough for the later half to run with a full pipeline.
        ahead: activations between two stages that may be sent before the first of them is received.

    Raises:
        Deadlock: a stage waits for a message that never comes.
    """
    stages = layout.placement.stages
    steps = steps or 4 * (2 + layout.lam_lag + -(-2 * stages // layout.micro_batches))
    clocks = [_Stage(stage, all_instructions(layout, stage, steps)) for stage in range(stages)]
    channels: dict[tuple[str, int, int], _Channel] = defaultdict(_Channel)
    while any(clock.instruction is not None for clock in clocks):
        if not sum(clock.run(duration, channels, ahead) for clock in clocks):
            waiting = (f"stage {c.number} at {c.instruction}" for c in clocks if c.instruction is not None)
            raise Deadlock("; ".join(waiting))
    return Simulation(tuple(tuple(clock.events) for clock in clocks), steps)


class _Channel:
    """Messages from one stage to another, in order."""

    def __init__(self) -> None:
        self.sent: list[tuple[float, Instruction]] = []
        self.received: list[float] = []


class _Stage:
    def __init__(self, number: int, instructions: Iterator[Instruction]) -> None:
        self.number, self._instructions = number, instructions
        self.time = 0.0
        self.events: list[Event] = []
        self.instruction: Instruction | None = next(instructions)

    def run(self, duration: Duration, channels: dict[tuple[str, int, int], _Channel], ahead: int) -> int:
        """Carry out instructions until a message is missing; returns how many."""
        done = 0
        while self.instruction is not None:
            start = self._start(self.instruction, channels, ahead)
            if start is None:
                break
            end = start + duration(self.number, self.instruction)
            self.events.append(Event(self.time, start, end, self.instruction))
            self.time = end
            self.instruction = next(self._instructions, None)
            done += 1
        return done

    def _start(
        self, instruction: Instruction, channels: dict[tuple[str, int, int], _Channel], ahead: int
    ) -> float | None:
        """When the instruction can start; ``None`` while the message it needs is missing."""
        channel = channels[_edge(self.number, instruction)]
        match instruction:
            case ReceiveActivation() | ReceiveCotangents() | ReceiveWeights():
                if len(channel.received) == len(channel.sent):
                    return None
                arrival, message = channel.sent[len(channel.received)]
                _check(instruction, message)
                channel.received.append(max(self.time, arrival))
                return channel.received[-1]
            case SendActivation():
                number = len(channel.sent) - ahead
                if number >= len(channel.received):
                    return None
                taken = channel.received[number] if number >= 0 else 0.0
                channel.sent.append((max(self.time, taken), instruction))
                return max(self.time, taken)
            case SendCotangents() | SendWeights():
                channel.sent.append((self.time, instruction))
        return self.time


def _edge(stage: int, instruction: Instruction) -> tuple[str, int, int]:
    match instruction:
        case SendActivation():
            return ("activation", stage, stage + 1)
        case ReceiveActivation():
            return ("activation", stage - 1, stage)
        case SendCotangents():
            return ("cotangent", stage, stage - 1)
        case ReceiveCotangents():
            return ("cotangent", stage + 1, stage)
        case SendWeights(reader):
            return ("weights", stage, reader)
        case ReceiveWeights(owner):
            return ("weights", owner, stage)
    return ("", stage, stage)


def _check(received: Instruction, sent: Instruction) -> None:
    """Raise ``Deadlock`` if sender and receiver disagree on which message comes next."""
    match received, sent:
        case ReceiveActivation(a), SendActivation(b):
            same = a == b
        case ReceiveCotangents(a, m), SendCotangents(b, n):
            same = (a, m) == (b, n)
        case _:
            same = True
    if not same:
        raise Deadlock(f"{received} meets {sent}")
