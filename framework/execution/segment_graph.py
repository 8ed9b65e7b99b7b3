"""A segment's run on one micro-batch, through which gradients are led afterwards; what it can be run again from.

A run without a graph saves nothing for a backward pass. Run again it repeats the first one to the last bit: the same
input, random numbers (dropout, stochastic depth) and buffers; BatchNorm's statistics and other buffers move once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from framework.network import Segment
from framework.network.norm import frozen_statistics
from framework.runtime.errors import UserError


class SegmentGraph:
    """What gradients pass through: the graph of a whole segment, or of its pieces, one after the other.

    Pieces are run again in every pass, the last one first, and none of their graphs stays.

    Args:
        runs: of the segment, or of its pieces in order.
    """

    def __init__(self, runs: list[Run]) -> None:
        self._runs = runs

    def forward(self, x: Tensor) -> Tensor:
        """The segment's output, detached."""
        for run in self._runs:
            x = run.forward(x)
        return x

    def input_gradient(self, cotangent: Tensor, keep: bool) -> Tensor:
        """From the cotangent at the output that at the input; ``keep`` leaves the graph, if it is a whole segment's."""
        keep = keep and len(self._runs) == 1
        for run in reversed(self._runs):
            (cotangent,) = run.gradients(cotangent, [], of_input=True, keep=keep)
        return cotangent

    def weight_gradients(
        self, cotangent: Tensor, parameters: Sequence[nn.Parameter], of_input: bool
    ) -> list[Tensor]:
        """The last pass, after which nothing is left: gradients of the parameters and, if asked for, of the input."""
        if len(self._runs) == 1:
            return self._runs.pop().gradients(cotangent, parameters, of_input, keep=False)
        found: dict[nn.Parameter, Tensor] = {}
        wanted = set(parameters)
        while self._runs:
            run = self._runs.pop()
            own = [p for p in run.part.parameters() if p in wanted]
            below = of_input or bool(self._runs)
            if own or below:
                gradients = run.gradients(cotangent, own, below, keep=False)
                cotangent = gradients.pop() if below else cotangent
                for p, g in zip(own, gradients, strict=True):
                    found[p] = found[p] + g if p in found else g
        return [*(found[p] for p in parameters), *([cotangent] * of_input)]


class Run:
    """One run of a segment or of a piece of it.

    Args:
        function: what runs.
        part: the modules, buffers and parameters that it uses.
        crossed: whether a gradient of the input may be asked for.
        graph: whether the first run leaves one.
        again: whether it may be run again.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], part: Segment, crossed: bool, graph: bool, again: bool
    ) -> None:
        self._function, self.part, self._crossed = function, part, crossed
        self._leaves_graph, self._again = graph, again
        self._start: Start | None = None
        self._graph: tuple[Tensor, Tensor] | None = None  # input, output

    def forward(self, x: Tensor) -> Tensor:
        """The output, detached."""
        self._start = Start(x, self.part) if self._again else None
        with nullcontext() if self._leaves_graph else saving_nothing():
            graph = self._run(x)
        if self._start is not None:
            self._start.end()
        if self._leaves_graph:
            self._graph = graph
        return graph[1].detach()

    def gradients(
        self, cotangent: Tensor, parameters: Sequence[nn.Parameter], of_input: bool, keep: bool
    ) -> list[Tensor]:
        """Those of the parameters and, if asked for, of the input. Where there is no graph, this runs again."""
        if self._graph is None:
            assert self._start is not None
            with self._start.again() as x:
                self._graph = self._run(x)
        x, output = self._graph
        if not keep:
            self._graph = None
        wanted = [*parameters, x] if of_input else list(parameters)
        return list(torch.autograd.grad(output, wanted, cotangent, retain_graph=keep))

    def _run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_(self._crossed)
        return x, self._function(x)


class Start:
    """What a run depends on besides weights.

    Args:
        x: its input.
        part: what runs.
    """

    def __init__(self, x: Tensor, part: Segment) -> None:
        # Saved as autograd saves tensors, so that hooks which count or move those see this one. The output is kept:
        # with it PyTorch 2.11 frees what its node has saved.
        self._kept = Kept.apply(torch.empty(0, device=x.device, requires_grad=True), x.detach())
        self._modules, self._device = part.modules(), x.device
        self._random = torch.get_rng_state()
        self._random_of_gpu = torch.cuda.get_rng_state(x.device) if x.is_cuda else None
        self._buffers = [
            (module, name, buffer, buffer._version, buffer.clone()) for module, name, buffer in _buffers(part)
        ]

    def end(self) -> None:
        """After the first run: forget the buffers that did not move."""
        self._buffers = [
            entry
            for entry in self._buffers
            if entry[0]._buffers[entry[1]] is not entry[2] or entry[2]._version != entry[3]
        ]

    @contextmanager
    def again(self) -> Iterator[Tensor]:
        """All is as it was at the start; afterwards, as it is now. The input."""
        now = [module._buffers[name] for module, name, *_ in self._buffers]
        with (
            frozen_statistics(*self._modules),
            torch.random.fork_rng([self._device] if self._random_of_gpu is not None else []),
        ):
            torch.set_rng_state(self._random)
            if self._random_of_gpu is not None:
                torch.cuda.set_rng_state(self._random_of_gpu, self._device)
            for module, name, _, _, before in self._buffers:
                module._buffers[name] = before.clone()
            try:
                yield self._kept.grad_fn.saved_tensors[0]
            finally:
                for (module, name, *_), buffer in zip(self._buffers, now, strict=True):
                    module._buffers[name] = buffer


class Kept(torch.autograd.Function):
    """Has a node that saves a tensor, for itself."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return anchor.clone()


def saving_nothing() -> Any:
    """Gradients are on, since kernels may be chosen by that, but autograd saves no tensors."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, _nothing)


def _nothing(saved: object) -> Tensor:
    raise RuntimeError("a run without a graph has no gradients")


def check_repeatable(segments: Iterable[Segment]) -> None:
    """Refuse segments that could not be run again as they ran first.

    Raises:
        UserError: a module draws from a generator of random numbers of its own.
    """
    for segment in segments:
        for module in (inner for child in segment.modules() for inner in child.modules()):
            if any(isinstance(value, torch.Generator) for value in vars(module).values()):
                raise UserError(
                    f"execution.recompute: {type(module).__name__} in segment {segment.name} has a torch.Generator "
                    "of its own and would draw anew; use PyTorch's default one"
                )


def _buffers(part: Segment) -> Iterable[tuple[nn.Module, str, Tensor]]:
    """All but the statistics of BatchNorms, which stand still in ``frozen_statistics``."""
    modules = dict.fromkeys(m for module in part.modules() for m in module.modules())
    for module in modules:
        if not isinstance(module, _BatchNorm):
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    yield module, name, buffer
    for path in part.own:
        owner, _, name = path.rpartition(".")
        module = part.backbone.get_submodule(owner)
        buffer = module._buffers.get(name)
        if buffer is not None and module not in modules:
            yield module, name, buffer
