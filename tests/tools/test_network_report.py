"""The table of networks: one that is right, one that is refused; all of timm's modules under ``-m soak``."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import timm

from framework.analysis.network_checks import check
from framework.analysis.representatives import REPRESENTATIVES
from tests.support.commands import run_tool
from tests.support.marks import slow, soak

#: pass several tensors from block to block; tokens of hiera lie in another order than the picture; the last shares a
#: position network with dropout among all blocks
REFUSED = {
    *("coat_tiny", "crossvit_tiny_240", "efficientvim_m1", "pit_ti_224", "tnt_s_legacy_patch16_224"),
    *("gemma4_vit_167m", "hiera_tiny_224", "nasnetalarge", "pnasnet5large", "vit_srelpos_small_patch16_224"),
}


def test_every_module_of_timm_has_a_representative() -> None:
    modules = {module for module in timm.list_modules() if module not in ("cifar", "presnet", "shufflenet")}
    assert all(any(name in timm.list_models(module=module) for name in REPRESENTATIVES) for module in modules)


@pytest.mark.parametrize(
    "name", [*slow(["resnet10t"]), *soak(n for n in REPRESENTATIVES if n != "resnet10t")]
)
def test_a_network_is_cut_rightly_or_refused(name: str) -> None:
    row = check(name)
    assert not row["faults"]
    assert bool(row["reason"]) == (name in REFUSED)


def test_rows_that_are_there_are_not_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "networks.csv"
    path.write_text("network,stages,faults,reason\nresnet18,4,,\n")
    assert run_tool("network_report", "resnet18", "--csv", path) == 0
    assert "1 of 1 networks are cut, and equal" in capsys.readouterr().out
    assert [row["stages"] for row in csv.DictReader(path.read_text().splitlines())] == ["4"]
