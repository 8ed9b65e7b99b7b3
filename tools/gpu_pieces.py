"""What ``gpu_report`` does, in order: checks, which are files of tests, and rows of tables of speed and memory."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
Device = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class Piece:
    """Work for one process at a time.

    Attributes:
        name: in the report.
        each: seconds that one of its items may be expected to take, until some have been measured.
        limit: seconds without a sign after which its process hangs.
        tests: files whose tests marked ``gpu`` are its items, which pytest finds.
        rehearsed: pytest's ``-k`` in a rehearsal, which would else take long; "" for all.
        rows: its items, where they are rows of a table: row -> options of ``bench_step``, or nothing for memory.
        csv: the table's name.
    """

    name: str
    each: float
    limit: float = 120.0
    tests: tuple[str, ...] = ()
    rehearsed: str = ""
    rows: dict[str, str] = field(default_factory=dict)
    csv: str = ""

    def command(self, items: list[str], out: Path, device: Device) -> list[str]:
        """What works on these rows, or on all tests that are not done."""
        events = ["--events", str(out / EVENTS), "--piece", self.name]
        if self.rows:
            return [sys.executable, str(ROOT / "tools" / "gpu_rows.py"), *events, "--device", device, *items]
        quiet = [
            "-q",
            "--tb=short",
            "-p",
            "no:cacheprovider",
            "-o",
            f"faulthandler_timeout={self.limit / 2:g}",
        ]
        chosen = ["-k", self.rehearsed] if self.rehearsed and device == "cpu" else []
        plugin = ["-p", "gpu_events", *events, "-n", "0", "-m", "gpu", "--device", device]
        return [sys.executable, "-m", "pytest", *plugin, *quiet, *chosen, *self.tests]


EVENTS = "report.jsonl"

CHECKS = (
    Piece("methods", 0.5, tests=("tests/gpu/test_gpu_methods.py",), rehearsed="three or drawn or masks"),
    Piece(
        "CUDA graphs, measuring",
        0.6,
        tests=(
            "tests/gpu/test_gpu_graphs.py",
            "tests/execution/test_execution.py",
            "tests/tools/test_bench.py",
        ),
    ),
    Piece("precision", 0.5, tests=("tests/gpu/test_gpu_precision.py",), rehearsed="[gim- or [mim"),
    Piece("loading", 1.0, tests=("tests/gpu/test_gpu_loading.py",)),
    Piece(
        "engines",
        1.0,
        tests=("tests/gpu/test_gpu_engines.py",),
        rehearsed="lars or loco or deepspeed or nccl",
    ),
    Piece("no waiting", 0.3, tests=("tests/gpu/test_gpu_waits.py", "tests/network/test_norm.py")),
)
LATER = (
    Piece(
        "runs, compile",
        25.0,
        limit=240.0,
        tests=("tests/gpu/test_gpu_runs.py", "tests/gpu/test_gpu_compile.py"),
        rehearsed="other_settings or compiled",
    ),
)

RESNET50 = "--network resnet50 --image-size 224 --batch 256 --precision bf16 --channels-last"
RESNET32 = "--network resnet32 --modules 16"
RESNET110 = "--network resnet110 --modules 55"
SUPERVISED = ("bp", "dgl", "infopro", "mlaan")
TINY = "--network resnet8 --image-size 16 --batch 4"


def steps(name: str, options: str, methods: tuple[str, ...], csv: str, each: float) -> Piece:
    """Rows of ``bench_step``, one a method."""
    rows = {f"{name}, {method}": f"{options} --method {method} --rounds 3 --no-naive" for method in methods}
    return Piece(name, each, limit=240.0, rows=rows, csv=csv)


def memory(labels: tuple[str, ...]) -> Piece:
    """Rows of the papers' tables of memory."""
    return Piece("memory", 8.0, limit=240.0, rows=dict.fromkeys(labels, ""), csv="memory_measured")


def pieces(device: Device) -> tuple[Piece, ...]:
    """All, in order; in a rehearsal the rows are of networks that take milliseconds."""
    if device == "cpu":
        rows = {f"ResNet-8, {method}": f"{TINY} --method {method} --rounds 1" for method in ("gim", "mlaan")}
        impossible = {"ResNet-8, CUDA graph": f"{TINY} --cuda-graph", "memory": ""}
        tiny = Piece("rows", 2.0, limit=240.0, rows=rows | impossible, csv="step_cpu_rehearsal")
        return (*CHECKS, tiny, *LATER)
    r32, r110 = "step_gpu_resnet32_k16", "step_gpu_resnet110_k55"
    graph, batch = "--batch 1024 --cuda-graph", "--batch 1024"
    contrastive = ("simclr", "gim", "loco")
    return (
        *CHECKS,
        steps("ResNet-50, 224 px, bf16", RESNET50, contrastive, "step_gpu_resnet50_224px", 25.0),
        steps("ResNet-32, K=16", f"{RESNET32} {batch}", SUPERVISED, r32, 15.0),
        steps("ResNet-32, K=16, CUDA graph", f"{RESNET32} {graph}", SUPERVISED, r32, 20.0),
        memory(published()),
        steps("ResNet-110, K=55", f"{RESNET110} {batch}", SUPERVISED, r110, 40.0),
        steps("ResNet-110, K=55, CUDA graph", f"{RESNET110} {graph}", SUPERVISED, r110, 60.0),
        steps(
            "ResNet-32, 128 images, CUDA graph", f"{RESNET32} --batch 128 --cuda-graph", SUPERVISED, r32, 15.0
        ),
        *LATER,
    )


def published() -> tuple[str, ...]:
    """The papers' rows of memory."""
    from framework.analysis.memory_tables import PUBLISHED

    return tuple(f"{row.network}, {row.method} ({row.table})" for row in PUBLISHED)
