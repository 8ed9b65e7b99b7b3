"""The benchmarks of a step, of loading and of memory: what they compare, refuse and write down."""

from __future__ import annotations

import argparse
import csv
import importlib
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from framework.analysis import memory_tables
from framework.data.batch import Batch
from framework.execution import LocalNetwork
from framework.local.trunks import TRUNKS
from framework.pipeline.scheduling.schedule import Forward, SendActivation
from framework.pipeline.scheduling.simulation import Event
from framework.runtime.errors import UserError
from tests.support.runs import ROOT

CSVS = sorted((ROOT / "recipes" / "results").glob("step_cpu_*.csv"))


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of ``tools`` by name."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module


def run(module: Any, monkeypatch: pytest.MonkeyPatch, *argv: object) -> None:
    monkeypatch.setattr("sys.argv", [module.__name__, *map(str, argv)])
    module.main()


def settings(**changed: Any) -> argparse.Namespace:
    """Arguments of ``bench_step`` for a step of milliseconds."""
    arguments = {
        "network": "resnet8",
        "modules": None,
        "cut": None,
        "window": 2,
        "head": "paper",
        "image_size": 16,
        "batch": 4,
        "rounds": 1,
        "precision": "fp32",
        "channels_last": False,
        "cuda_graph": False,
        "compile": False,
        "no_naive": False,
        "breakdown": False,
    }
    return argparse.Namespace(**{**arguments, **changed})


@pytest.mark.parametrize(
    ("method", "head", "message"),
    [
        ("dgl,mlaan", "3c4f", "--head 3c4f: for --method mlaan must be paper"),
        ("bp", "gap", "--head gap: for --method bp must be paper"),
        (
            "gim",
            "mlp",
            "--head mlp: for --method gim must be paper or gap or moco or mocov3 or byol or simsiam",
        ),
        ("mlam", "paper", "--method mlam: must be among simclr, gim, .*mlaan"),
        ("bp+layer", "paper", r"--method bp\+layer: what is run again must be segment or block"),
    ],
)
def test_a_head_that_would_be_ignored_is_refused(
    tool: Any, monkeypatch: pytest.MonkeyPatch, method: str, head: str, message: str
) -> None:
    bench = tool("bench_step")
    monkeypatch.setattr(bench, "row", lambda *_: pytest.fail("measured before the refusal"))
    with pytest.raises(UserError, match=f"^{message}$"):
        run(bench, monkeypatch, "--method", method, "--head", head)


def test_heads_on_offer_are_those_that_change_the_method(tool: Any) -> None:
    benched = tool("benched_steps")
    for method, offered in benched.HEADS.items():
        own = benched.options(method, "paper", 2)
        objectives = benched.OBJECTIVES if method in benched.CONTRASTIVE else ()
        heads = ("gap", *TRUNKS, *objectives)
        changing = {head for head in heads if benched.options(method, head, 2) != own}
        if method in benched.CONTRASTIVE:
            assert set(offered) == {"paper", "gap", *objectives} and changing >= {"gap", *objectives}
        else:
            assert changing <= set(offered) and len(offered) - len(changing) in (1, 2), method


def test_end_to_end_is_one_segment_that_is_compiled_whole(tool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, compiled = tool("bench_step"), []
    monkeypatch.setattr(LocalNetwork, "compile_segments", lambda net: compiled.append(len(net.segments)))
    eager = bench.row("mlm", settings())
    assert compiled == [] and eager["ratio_time_naive"] > 0 and eager["speedup"] is None
    quick = bench.row("mlm", settings(compile=True))
    assert compiled == [1, 3] and quick["ratio_time_naive"] is None and quick["speedup"] > 0
    peak = tool("benched_steps").peak_activations
    whole, cut = (tool("benched_steps").build("bp", settings(), 16, at) for at in (1, "block"))
    batch = Batch(torch.randn(4, 3, 16, 16), torch.randint(10, (4,)))
    assert peak(whole, batch) == peak(cut, batch)


@pytest.mark.slow
def test_rows_of_what_is_computed_again(tool: Any) -> None:
    """End-to-end beside it keeps all its activations."""
    kept, again = (tool("bench_step").row(m, settings(no_naive=True)) for m in ("bp", "bp+segment"))
    assert kept["ratio_peak_activations"] == 1.0 and again["ratio_peak_activations"] < 0.9
    assert again["reference"] == "bp" and again["ratio_time"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["byol", "moco"])
def test_a_teacher_costs_a_forward_pass_of_what_it_sees(tool: Any, objective: str) -> None:
    """Where projections weigh little; MoCo's students and teacher see one view each, half of the images."""
    row = tool("bench_step").row("gim", settings(head=objective, network="resnet50", image_size=128))
    expected = 1.0 if objective == "byol" else 0.5
    assert row["ratio_flops_infonce"] == pytest.approx(expected, rel=0.05) and row["ratio_time_infonce"] > 0


def test_the_table_has_the_peak_and_how_much_less_it_is(
    tool: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = tool("bench_step")
    row = bench.row("dgl", settings(head="gap"))
    bench.show([row])
    assert "GiB" not in capsys.readouterr().out
    bench.show([{**row, "busy": 0.9, "peak_bytes": 3 * 2**30, "ratio_peak": 1 / 1.28}])
    assert "3.00 GiB" in (printed := capsys.readouterr().out) and "1.28x" in printed


def test_heads_are_timed_as_in_a_step(tool: Any) -> None:
    """In the step's precision, on maps where the network has tokens; the last pools as the network does, on tokens."""
    benched = tool("benched_steps")
    arguments = settings(network="vit_tiny_patch16_224", precision="bf16", head="gap")
    net = benched.build("gim", arguments, 224, 2)
    batch, seen = Batch(torch.randn(4, 3, 224, 224), None, 2), {}

    def look(head: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen[head] = (inputs[0].dim(), torch.is_autocast_enabled("cpu"))

    for unit in net.plan.units:
        unit.head.register_forward_pre_hook(look)
    costs = benched.head_times(net, batch, 1)
    *lower, last = (seen[unit.head] for unit in net.plan.units)
    assert set(lower) == {(4, True)} and last == (3, True)
    assert [cost["unit"] for cost in costs] == [u.name for u in net.plan.units]


def test_a_round_on_a_gpu_is_a_block_of_steps(tool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    benched, clock, done = tool("benched_steps"), [0.0], []

    def step() -> None:
        done.append("step")
        clock[0] += 0.5

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    monkeypatch.setattr(benched.time, "perf_counter", lambda: clock[0])
    assert benched.measure([step], rounds=3, warm_up=1) == [[0.5] * 3]
    assert done == [*["step"] * benched.STEPS, "wait"] * 4


@pytest.mark.parametrize("path", CSVS, ids=[path.stem for path in CSVS])
def test_a_row_is_added_below_those_of_earlier_tables(tool: Any, tmp_path: Path, path: Path) -> None:
    bench = tool("csv_rows")
    copy = Path(shutil.copy(path, tmp_path))
    before = bench.read(path)
    assert before and bench.is_in(
        copy, {key: before[0][key] for key in ("network", "method", "head", "batch")}
    )
    bench.append(copy, {"network": "resnet8", "peak_bytes": 7})
    *kept, added = bench.read(copy)
    assert [{key: line[key] for key in before[0]} for line in kept] == before
    assert (added["network"], added["peak_bytes"]) == ("resnet8", "7")


def test_the_rate_of_a_loader_says_what_it_is_of(tool: Any) -> None:
    bench = tool("loader_rates")
    on_core = bench.timed(12.34, gpu=False, on_gpu=False)
    assert on_core["images_per_second_per_core"] == 12.3 and on_core["clock"] == "processor"
    by_clock = bench.timed(12.34, gpu=True, on_gpu=False)
    assert by_clock == {"images_per_second": 12.3, "device": on_core["device"], "clock": "wall"}


@pytest.mark.slow
def test_counted_rows_as_a_table(tool: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report, found = tool("memory_report"), tmp_path / "found.csv"
    monkeypatch.setattr(memory_tables, "PUBLISHED", memory_tables.PUBLISHED[4:5])
    monkeypatch.setattr(memory_tables, "STAGES", {})
    run(report, monkeypatch, "--images", 8, "--csv", found, "--out", tmp_path)
    (row,) = csv.DictReader(found.open())
    assert (row["paper_end_to_end_gb"], row["paper_method_gb"], row["images"]) == ("3.37", "2.62", "8")
    whole, ours, saving = (float(row[f"counted_{key}"]) for key in ("end_to_end_gib", "method_gib", "saving"))
    assert saving == pytest.approx(whole / ours, rel=1e-3) and saving > 1
    assert float(row["counted_to_paper"]) == pytest.approx(saving / (3.37 / 2.62), rel=1e-3)
    assert row["device"] and row["commit"]


def test_the_committed_count_has_the_papers_rows_as_they_are_printed() -> None:
    lines = list(csv.DictReader((ROOT / "recipes" / "results" / "memory_counted.csv").open()))
    assert [line["plan"] for line in lines] == [
        f"{r.network}, {r.method} ({r.table})" for r in memory_tables.PUBLISHED
    ]
    assert [line["images"] for line in lines] == [str(r.images) for r in memory_tables.PUBLISHED]
    for line, row in zip(lines, memory_tables.PUBLISHED, strict=True):
        assert float(line["paper_saving"]) == pytest.approx(row.saving, rel=1e-3), line["plan"]
        assert float(line["counted_to_paper"]) == pytest.approx(
            float(line["counted_saving"]) / row.saving, rel=2e-3
        )
        assert not line["commit"].endswith("-dirty")


@pytest.mark.gpu
def test_what_an_earlier_row_left_on_the_gpu_does_not_count(gpu: torch.device) -> None:
    recipe = memory_tables.published_recipe("cifar10/mlaan_r32_k16_cifar10")
    alone = memory_tables._allocated(recipe, 10, 8)
    left = torch.empty(2**28, device="cuda")
    assert memory_tables._allocated(recipe, 10, 8) == pytest.approx(alone, rel=0.05)
    assert alone < left.numel()


def test_a_slow_core_sleeps_for_the_rest_of_what_work_takes(tool: Any) -> None:
    """More stages than cores are measured so: work takes a multiple of its processor time, a message what it takes."""
    slow = tool("slow_cores")
    core, start = slow.SlowCore(3.0), time.perf_counter()
    used = time.thread_time()
    while time.thread_time() - used < 0.01:
        pass
    core.append(Event(start, start, time.perf_counter(), Forward(0, 0)))
    assert core[0].end - start >= 0.03
    message = Event(start, start, start + 1, SendActivation(0))
    core.append(message)
    assert core[1] == message
    assert slow.slowness(1) == 1 and slow.slowness(10**6) > 10
