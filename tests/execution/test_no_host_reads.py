"""In a training step the host reads nothing of the device and sends it nothing: it launches, and does not wait.

On the device ``meta`` a read is an error; ``tests/gpu/test_gpu_waits.py`` has the same on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from framework.config.views import Views
from framework.data.augment.views import UNIFORMS, augment_params, finish_views
from framework.data.batch import Batch
from framework.engines import ddp
from framework.engines.base import EngineSettings
from framework.execution import LocalNetwork
from framework.local import methods
from framework.model import local_network
from framework.network.norm import RunningStatistics
from framework.optim import build_optimizer
from framework.runtime.distributed import world_size
from tests.support import networks
from tests.support.host_reads import META, no_host_reads
from tests.support.marks import slow


@dataclass(frozen=True)
class Row:
    """What is trained: a case of ``networks.CASES``, or DGL where its modules draw from replay buffers."""

    case: str
    optimizer: str = "sgd"
    more: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([self.case, self.optimizer, *map(str, self.more.values())])

    def network(self, device: torch.device) -> LocalNetwork:
        if self.case != "replay":
            name = "resnet14" if self.case == "mlm-6" else "resnet8"
            return networks.network(self.case, name, **self.more).to(device)
        options = methods.load("dgl").Options(async_mode="buffer", buffer_order="random")
        with device:  # their counter is read where it was moved to
            return local_network("resnet8", "dgl", options, image_size=16, num_classes=10).train()


def batch(net: LocalNetwork, device: torch.device) -> Batch:
    data = networks.batch(net, size=4)
    labels = None if data.labels is None else data.labels.to(device)
    return data._replace(images=data.images.float().to(device), labels=labels)


def steps(
    row: Row, device: torch.device, watched: Callable[[], AbstractContextManager[None]], before: int = 0
) -> None:
    """Two whole steps of two micro-batches that are watched, with what engines do with them; ``before``, others."""
    net = row.network(device)
    data = batch(net, device)
    optimizer = build_optimizer(net, name=row.optimizer, weight_decay=1e-3, constant=net.constant_rate())
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for step in range(2 + before):
        with watched() if step >= before else nullcontext():
            overflows = []
            for last in (False, True):
                output = net(data._replace(last=last))
                (output.loss / 2).backward()
                overflows += [] if output.overflow is None else [output.overflow]
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.skip = torch.stack(overflows).any() if overflows else None
            optimizer.step()
            optimizer.zero_grad()


FEW = [Row("loco-moco", "lars", {"precision": "fp16"})]
MORE = [Row(case) for case in networks.CASES] + [Row("replay")]
MORE += [Row(case, "lars", {"precision": "fp16"}) for case in ("mlaan", "loco-upper", "dfa", "mim")]
MORE += [Row(case, "adamw", {"precision": "bf16"}) for case in ("gim-byol", "sign-2", "infopro")]
MORE += [Row(case, "sgd", {"skip_nonfinite": True}) for case in ("loco-soft", "mlaan-code")]

MORE += [Row(case, "sgd", {"recompute": kind}) for case, kind in (("loco", "segment"), ("simclr", "block"))]


@pytest.mark.parametrize("row", [*FEW, *slow(MORE)], ids=str)
def test_a_step_is_launched_without_waiting(row: Row) -> None:
    steps(row, META, no_host_reads)


SKIPPING = {"precision": "fp16", "skip_nonfinite": True}
ENGINES = [(Row("mlaan", more=SKIPPING), 0.0)]
MORE_ENGINES = [(Row("mlaan"), 0.0), (Row("loco-soft"), 1.0), (Row("gim-byol", "adamw"), 0.0)]
MORE_ENGINES += [(Row("gim-byol", "adamw", {"precision": "fp16"}), 1.0)]
MORE_ENGINES += [(Row("mlaan", "lars", {"skip_nonfinite": True}), 0.0)]


@pytest.mark.parametrize(("row", "clip"), [*ENGINES, *slow(MORE_ENGINES)], ids=str)
def test_an_engine_launches_steps_without_waiting(row: Row, clip: float) -> None:
    """Losses and whether steps are skipped stay on the device; averages of weights follow there, too."""
    net = row.network(META)
    net.keep_average(0.9)
    net.to(META)
    data = [batch(net, META)] * 2
    make_optimizer = partial(build_optimizer, name=row.optimizer)
    engine = ddp.build(net, make_optimizer, EngineSettings(batch_size=8, micro_batches=2, clip=clip))
    statistics, launched = RunningStatistics(net), []
    net.register_forward_hook(lambda *_: launched.append("gradients"))

    def lr() -> float:
        launched.append("rate")  # which may wait for the step before
        return 0.1

    with no_host_reads():
        for _ in range(2):
            statistics.remember()
            result = engine.step(data, lr)
            if result.overflow is not None:
                statistics.put_back(result.overflow)
            engine.finish()
            net.average.update(net, net.taken)
            assert result.unit_losses.is_meta and (result.overflow is not None) == bool(row.more)
    assert launched == ["gradients", "gradients", "rate"] * 2 and engine.lag


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """This is one of two, which exchange nothing."""
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mlaan", "loco-moco", "simclr-mocov3", "loco-barlow", "scpl", "mim"])
def test_ranks_exchange_tensors_without_waiting(two_ranks: None, case: str) -> None:
    """BatchNorm's statistics, embeddings, keys of other ranks, masks of the first, overflows."""
    assert world_size() == 2
    steps(Row(case, "lars", {"precision": "fp16", "sync_bn": True}), META, no_host_reads)


@pytest.mark.parametrize("kind", ["simclr", "cifar"])
def test_views_are_finished_without_waiting(kind: str) -> None:
    """Their numbers are drawn by the host, and go to the device on the loader's stream."""
    views = Views(kind=kind)  # type: ignore[arg-type]
    params = augment_params(views, np.random.default_rng(0).random((2, 8, UNIFORMS)))
    pixels = torch.zeros(16, 3, 24, 24, dtype=torch.uint8)
    with no_host_reads(uploads=True):
        assert finish_views(views, pixels, params, META).shape == pixels.shape


READS: dict[str, Callable[[Tensor], object]] = {
    "number": lambda x: x.sum().item(),
    "truth": lambda x: bool(x.any()),
    "rows where": lambda x: x[x[:, 0] > 0],
    "list of rows": lambda x: x[[1, 0]],
    "numbers of the host": lambda x: x.new_tensor([1.0, 2.0]),
    "new tensor": lambda x: torch.tensor(1.0, device=x.device),
    "copy": lambda x: x.copy_(torch.ones(2)),
    "upload": lambda x: torch.ones(2).to(x.device, non_blocking=True),
    "rows of the host": lambda x: x[torch.tensor([1, 0])],
    "scalar where a tensor is meant": lambda x: torch._foreach_add_([x], x.sum()),
}


class Operations(TorchDispatchMode):
    """Counts the operations that a dispatch mode sees."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


UNSEEN_BEFORE = ("list of rows", "numbers of the host", "new tensor")  # in PyTorch 2.11, for one


@pytest.mark.parametrize("kind", READS)
def test_what_would_wait_is_found(kind: str) -> None:
    with Operations() as seen:
        torch.tensor(1.0, device=META)
    if kind in UNSEEN_BEFORE and not seen.count:
        pytest.skip("this PyTorch makes tensors of the host's numbers where no mode can see it")
    with (
        no_host_reads(),
        pytest.raises((AssertionError, RuntimeError)),
    ):  # the second: NotImplementedError, too
        READS[kind](torch.ones(2, 2, device=META))


def test_what_does_not_wait_is_let_pass() -> None:
    x = torch.ones(2, 2, device=META)
    with no_host_reads():
        x = torch.where(x > 0, x * torch.tensor(2.0), 1.0) + np.float64(3)
        x.fill_(x.sum())
        assert (x.new_full((3,), 2.0) / 2).device == META
