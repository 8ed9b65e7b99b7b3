"""The table of networks: one that is right, one that is refused; all of timm's modules under ``-m soak``."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import timm

from framework.analysis.network_checks import check, cut_only
from framework.analysis.representatives import REPRESENTATIVES
from tests.support.commands import run_tool
from tests.support.marks import slow, soak

#: the features of the first three are several tensors; the last shares a position network with dropout among all blocks
REFUSED = {"coat_tiny", "crossvit_tiny_240", "efficientvim_m1", "vit_srelpos_small_patch16_224"}


def test_every_module_of_timm_has_a_representative() -> None:
    modules = {module for module in timm.list_modules() if module not in ("cifar", "presnet", "shufflenet")}
    assert all(any(name in timm.list_models(module=module) for name in REPRESENTATIVES) for module in modules)


@pytest.mark.parametrize(
    "name", [*slow(["resnet10t"]), *soak(n for n in REPRESENTATIVES if n != "resnet10t")]
)
def test_a_network_is_cut_rightly_or_refused(name: str) -> None:
    row = check(name)
    assert not row["faults"]
    assert ("stages" in row) == (name not in REFUSED)
    assert "stages" in row or "can't be cut" in row["reason"]


def test_rows_that_are_there_are_not_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "networks.csv"
    path.write_text("network,stages,faults,reason\nresnet18,4,,\n")
    assert run_tool("network_report", "resnet18", "--csv", path) == 0
    assert "1 of 1 networks are cut, and equal" in capsys.readouterr().out
    assert [row["stages"] for row in csv.DictReader(path.read_text().splitlines())] == ["4"]


@pytest.mark.parametrize(("name", "blocks"), [("resnet18", 8), *slow([("crossvit_tiny_240", None)])])
def test_whether_a_network_can_be_cut_is_told_without_computing(name: str, blocks: int | None) -> None:
    row = cut_only(name)
    assert row.get("blocks") == blocks
    assert bool(row["reason"]) == (blocks is None)


@pytest.mark.slow
def test_a_network_runs_in_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The row of one that is refused, and a name that nobody knows as a fault, with status 64."""
    path = tmp_path / "networks.csv"
    assert run_tool("network_report", "--cut-only", "crossvit_tiny_240", "--csv", path) == 0
    assert "features are list" in path.read_text()
    assert run_tool("network_report", "--cut-only", "resnet19", "--csv", path) == 64
    assert (
        "1 of 1 networks: resnet19: UserError: network.name=resnet19: no such network"
        in capsys.readouterr().err
    )
