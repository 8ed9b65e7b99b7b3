"""A training step's losses and gradients as one CUDA graph: small networks are bound by the launches of kernels.

Everything up to the finished gradients is recorded, including BatchNorm's statistics and what heads do once a step,
which are updates in place. The optimizer is not recorded: its learning rate is a number on the host that changes with
every step, and a rate read from the device would be rounded differently.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from framework.data.batch import Batch
from framework.execution.local_network import LocalNetwork

Outputs = list[Tensor]
Recorder = Callable[[Callable[[], Outputs]], tuple[Callable[[], None], Outputs]]
WARM_UP = 3  # runs before the recording, in which libraries choose kernels and take their workspaces


class RecordedStep:
    """The routed step on batches of one size, replayed without launching its kernels one by one.

    Args:
        net: in training mode; the parameters keep their storage from now on.
        batch: an example.
        record: see ``record``.

    Attributes:
        unit_losses: (U,) of the last step.
        gradients: by parameter, of the last step; the next one overwrites them.
    """

    def __init__(self, net: LocalNetwork, batch: Batch, record: Recorder | None = None) -> None:
        self._net = net
        self._batch = batch._replace(
            images=batch.images.to(memory_format=net.layout, copy=True),
            labels=None if batch.labels is None else batch.labels.clone(),
        )
        self._learners: list[nn.Parameter] = []
        with as_before(net):
            self._replay, (self.unit_losses, *gradients) = (record or record_graph)(self._work)
        self.gradients = dict(zip(self._learners, gradients, strict=True))

    def run(self, batch: Batch) -> None:
        """Losses and gradients of another batch."""
        self._batch.images.copy_(batch.images)
        if self._batch.labels is not None and batch.labels is not None:
            self._batch.labels.copy_(batch.labels)
        self._replay()

    def _work(self) -> Outputs:
        self._net.start_micro_batch()
        step, _ = self._net.routed_step(self._batch)
        self._net.end_micro_batch(self._batch)
        self._learners = list(step.gradients)
        losses = torch.stack([step.losses[i] for i in range(len(self._net.plan.units))])
        return [losses, *step.gradients.values()]


def record_graph(work: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
    """Record what ``work`` does on the GPU; returns a function that repeats it, and the tensors that this writes to."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(aside)
    gc.collect()  # frees autograd graphs, which belong to another stream
    graph = torch.cuda.CUDAGraph()
    # With "thread_local", threads of the loader may use the GPU during the recording.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = work()
    return graph.replay, outputs


@contextmanager
def as_before(net: nn.Module) -> Iterator[None]:
    """Restores buffers (statistics, copies in heads) and the state of random number generators at the end."""
    buffers = list(net.buffers())
    before = [buffer.clone() for buffer in buffers]
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
