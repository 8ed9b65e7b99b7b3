"""In a training step the host reads nothing of the device and sends it nothing: it launches, and does not wait."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from framework.config.method_options import Execution
from framework.data.batch import Batch
from framework.execution import LocalNetwork
from framework.execution.replay_buffer import ReplayBufferStrategy
from framework.local.methods import dgl, gim, loco
from framework.local.heads import Projection
from framework.optim import build_optimizer
from tests.support import networks
from tests.support.host_reads import META, no_host_reads
from tests.support.marks import slow


@dataclass(frozen=True)
class Row:
    case: str
    optimizer: str = "lars"
    precision: str = "fp32"
    skip_nonfinite: bool = False
    network: str = "resnet8"

    def __str__(self) -> str:
        return " ".join([self.case, self.optimizer, self.precision, *["skip"] * self.skip_nonfinite])

    def build(self) -> LocalNetwork:
        return networks.network(
            self.case,
            self.network,
            precision=self.precision,
            skip_nonfinite=self.skip_nonfinite,
        )


def steps(net: LocalNetwork, optimizer: str, batch: Batch, count: int = 2) -> None:
    """Whole steps of two micro-batches, and what an engine does with them, skipping included."""
    stepper = build_optimizer(net, name=optimizer, weight_decay=1e-3, constant=net.constant_rate())
    for group in stepper.param_groups:
        group["lr"] = 0.1
    for _ in range(count):
        overflows = []
        for last in (False, True):
            output = net(batch._replace(last=last))
            (output.loss / 2).backward()
            overflows += [] if output.overflow is None else [output.overflow]
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        stepper.skip = torch.stack(overflows).any() if overflows else False
        stepper.step()
        stepper.zero_grad()


def on(device: torch.device, net: LocalNetwork) -> tuple[LocalNetwork, Batch]:
    data = networks.batch(net, size=4)
    labels = None if data.labels is None else data.labels.to(device)
    return net.to(device), data._replace(images=data.images.float().to(device), labels=labels)


FEW = [Row("mlaan"), Row("loco-moco", "adamw", "fp16")]
EVERY = [Row(case, "sgd", network="resnet14") for case in networks.CASES]
EVERY += [Row(case, "lars", "fp16") for case in networks.GOLDEN]
EVERY += [Row(case, "lars", "bf16") for case in networks.GOLDEN]
EVERY += [Row(case, "adamw", "fp32", True) for case in networks.GOLDEN]

@pytest.mark.parametrize("row", FEW+EVERY, ids=str)
def test_a_step_is_launched_without_waiting(row) -> None:
    net, data = on(META, row.build())
    with no_host_reads():
        steps(net, row.optimizer, data)
