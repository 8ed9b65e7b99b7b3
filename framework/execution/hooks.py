"""Between a step and its engine: gradients go as soon as they are finished, weights come as late as they are used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from framework.execution.program import Program
from framework.execution.uses import Use


class StepHooks(Protocol):
    """What an engine does in the middle of a step.

    Attributes:
        in_slices: whether every rank has slices of the weights between uses, in the place of the weights.
    """

    in_slices: bool

    def before(self, use: Use) -> None:
        """The micro-batch is about to use weights."""

    def after(self, use: Use) -> None:
        """It has."""

    def before_read(self, s: int) -> None:
        """Between two steps, somebody looks at the weights of segment ``s`` and of the heads on it."""

    def lent(self, use: Use) -> AbstractContextManager[None]:
        """Inside, which is in no training step, these weights are used."""

    def total(self, part: Tensor) -> Tensor:
        """A sum over elements of weights, of which ``part`` is over what this rank has."""

    def penalized(self, gradients: Mapping[nn.Parameter, Tensor]) -> None:
        """The gradients of a penalty, in slices; those that this micro-batch finishes are the last of the step."""

    def finished(self, gradients: Mapping[nn.Parameter, Tensor]) -> None:
        """To these gradients of the micro-batch nothing is added any more, and the step keeps none of them."""


class WholeWeights:
    """The part of ``StepHooks`` that is the same wherever weights stay whole."""

    in_slices = False

    def after(self, use: Use) -> None:
        """See ``StepHooks``."""

    def total(self, part: Tensor) -> Tensor:
        """See ``StepHooks``."""
        return part

    def penalized(self, gradients: Mapping[nn.Parameter, Tensor]) -> None:
        """See ``StepHooks``."""
        raise AssertionError("penalties give whole gradients where weights are whole")


class Finishing:
    """When the gradients of a micro-batch are finished; worked out once, from the program.

    Args:
        program: of the step.
        penalties: whether penalties give gradients to the others, at the end.

    Attributes:
        parts: how many gradients are added up for each parameter.
        users: the lowest segment at which a step uses a parameter.
        order: the parameters as their gradients are finished, in groups with one user. Of those that are finished at
            once the lowest come first, because the next step needs them first.
    """

    def __init__(self, program: Program, penalties: bool = True) -> None:
        self.parts: Counter[nn.Parameter] = Counter()
        self.users: dict[nn.Parameter, int] = {}
        self._finished: dict[nn.Parameter, int] = {}
        segments = range(len(program.segments))
        for place, s in enumerate(reversed(segments) if program.top_first else segments):
            now = program.segment_programs[s]
            self._add(2 * place, s, [p for call in now.heads for p in call.parameters])
            for freed in now.freed:
                self._add(2 * place + 1, freed, program.trained(freed))
        for head in (head for head in program.plan.heads if head.penalizes and penalties):
            self._hold_back([*head.parameters(), *head.read_parameters(program.segments)])

    def _hold_back(self, parameters: Iterable[nn.Parameter]) -> None:
        """To the gradients of these one more is added, at the end of the micro-batch."""
        end = max(self._finished.values()) + 1
        for parameter in set(parameters) & self.parts.keys():
            if self._finished[parameter] < end:
                self.parts[parameter] += 1
            self._finished[parameter] = end

    @property
    def order(self) -> Sequence[Sequence[nn.Parameter]]:
        groups: dict[tuple[int, int], list[nn.Parameter]] = {}
        for parameter, moment in self._finished.items():
            groups.setdefault((moment, self.users[parameter]), []).append(parameter)
        return [groups[key] for key in sorted(groups)]

    def _add(self, moment: int, user: int, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            self.parts[parameter] += 1
            self.users[parameter] = min(user, self.users.get(parameter, user))
            self._finished[parameter] = moment


class Exchange:
    """An engine's hooks, and when a network's steps call them.

    Args:
        hooks: of the engine.
        program: of the step.
        taught: the last segment that a teacher follows; -1 where there is none.
    """

    def __init__(self, hooks: StepHooks, program: Program, taught: int) -> None:
        self.hooks, self.finishing = hooks, Finishing(program, penalties=not hooks.in_slices)
        reading = [unit for unit in program.plan.units if unit.head.reads and unit.head.reads_after]
        read = {s for unit in reading for s in (*unit.head.reads, unit.last)}
        self._read_between_steps = sorted(read | set(range(taught + 1)))

    def before_step(self) -> None:
        """Heads that look at weights between two steps, and a teacher, are to see them as they are after the first."""
        for s in self._read_between_steps:
            self.hooks.before_read(s)

    def early(self, watch: bool) -> EarlyGradients:
        """What takes the gradients of a micro-batch."""
        return EarlyGradients(self.hooks, self.finishing, watch)


class EarlyGradients:
    """Sees to it that hooks get the gradients of one micro-batch, each when it is finished.

    Args:
        hooks: of the engine.
        finishing: of the network's program.
        watch: whether to look at the gradients on their way.

    Attributes:
        norms: of the gradients that went, if they are looked at.
    """

    def __init__(self, hooks: StepHooks, finishing: Finishing, watch: bool = False) -> None:
        self.hooks, self._missing = hooks, Counter(finishing.parts)
        self._complete: list[nn.Parameter] = []
        self._watch = watch
        self.norms: list[Tensor] = []

    def added(self, parameters: Iterable[nn.Parameter]) -> None:
        """To the gradients of these a part was added."""
        for parameter in parameters:
            self._missing[parameter] -= 1
            if not self._missing[parameter]:
                self._complete.append(parameter)

    def release(self, gradients: dict[nn.Parameter, Tensor]) -> None:
        """Hand over what is complete, and take it out of ``gradients``."""
        complete, self._complete = self._complete, []
        if not complete:
            return
        finished = {parameter: gradients.pop(parameter) for parameter in complete}
        if self._watch:
            self.norms += torch._foreach_norm(list(finished.values()))
        self.hooks.finished(finished)
