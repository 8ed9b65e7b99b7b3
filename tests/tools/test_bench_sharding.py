"""What ``bench_sharding`` counts, against the bytes of the weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import ROOT


@pytest.mark.slow
def test_rows_of_every_engine(tmp_path: Path) -> None:
    """Local learning gathers once what end-to-end sharding gathers twice; data parallelism gathers nothing."""
    rows = tmp_path / "rows.json"
    arguments = ["--network", "resnet14", "--image-size", "32", "--batch", "8", "--method", "simclr,gim"]
    tool = [sys.executable, "tools/bench_sharding.py", *arguments, "--steps", "1", "--json", str(rows)]
    subprocess.run(tool, check=True, cwd=ROOT, capture_output=True)
    found = {(row["engine"], row["method"]): row for row in json.loads(rows.read_text())}
    assert set(found) == {
        ("ddp", "simclr"),
        ("ddp", "gim"),
        ("fsdp", "simclr"),
        ("fsdp", "gim"),
        ("fsdp2", "simclr"),
    }
    for (engine, _), row in found.items():
        weights = row["weight_bytes"]
        assert row["state_bytes"] == 4 * weights and row["peak_bytes"] > 0 and row["seconds"] > 0
        assert weights <= row["reduced_bytes"] <= 1.1 * weights
        assert (row["whole_weights"] == 1) == (engine == "ddp")
    gathered = {key: row["gathered_bytes"] / row["weight_bytes"] for key, row in found.items()}
    assert gathered["ddp", "gim"] == gathered["ddp", "simclr"] == 0
    assert 1 <= gathered["fsdp", "gim"] <= 1.05
    assert gathered["fsdp2", "simclr"] > 1.5
