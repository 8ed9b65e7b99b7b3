"""What is written down of rows that have ended: lines of the CSV, commands in logs."""

from __future__ import annotations

import csv
import fcntl
import json
import shutil
import threading
from pathlib import Path

import pytest
import torch

from framework.analysis import results_records
from framework.analysis.results_tables import ResultsTable
from framework.checkpoints.folder import identity_of, write_files
from framework.runtime.errors import UserError
from framework.tracking.metric_log import write_result
from tests.support.results import finish, named, table, write_down


@pytest.mark.parametrize("runs", [".", "r", "runs/of/mine"])
def test_a_command_in_a_log_lacks_paths_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = table(tmp_path, "data.workers=0")
    found = ResultsTable.read(path)
    found.score, found.linear_eval = "linear_top1", ["--preset", "moco"]
    (run,) = found.runs(path, Path(runs), ["data.path=/images", "optim.lr=0.1", "data.workers=1"])
    finish(run)
    training, evaluation = json.loads(results_records.Record(run).text().splitlines()[0])["commands"]
    short = json.loads(path.read_text())["overrides"]
    assert training == (
        f"OMP_NUM_THREADS=3 python framework/train.py recipes/quickstart_mlaan.yaml {' '.join(short)} "
        "optim.lr=0.1 data.workers=1 seed=0 run_dir=runs/digits/dglstar-k-2-seed0"
    )
    assert "data.workers=0" in short
    folder = "runs/digits/dglstar-k-2-seed0"
    assert evaluation == (
        f"OMP_NUM_THREADS=3 python tools/linear_eval.py {folder} --preset moco data.workers=1"
    )


def test_a_linear_evaluation_of_something_else_is_made_again(tmp_path: Path) -> None:
    path = table(tmp_path)

    def ended(*arguments: str) -> bool:
        found = ResultsTable.read(path)
        found.score, found.linear_eval = "linear_top1", ["--preset", "simclr", *arguments]
        (run,) = found.runs(path, tmp_path, ["data.path=/images"])
        return run.ended

    found = ResultsTable.read(path)
    (run,) = found.runs(path, tmp_path, ["data.path=/images"])
    finish(run)
    write_files(run.folder / "checkpoints" / "step-00000002", {"w": torch.zeros(1)}, {}, {})
    evaluation = run.folder / "evidence" / "linear_eval_simclr.json"
    old = {"checkpoint": "step-00000002", "preset": "simclr", "cached": False, "epochs": 90, "lr": 0.1}
    write_result(evaluation, old)  # of a time when less was said
    assert ended() and ended("--epochs", "90") and ended("data.fraction=0.5")
    assert not ended("--epochs", "80") and not ended("--lr", "0.2") and not ended("--cached")
    weights = identity_of(run.folder / "checkpoints" / "step-00000002")
    write_result(evaluation, old | weights | {"overrides": ["data.fraction=0.5"]})
    assert ended("data.fraction=0.5") and ended("data.fraction=0.5", "data.workers=0") and not ended()
    write_files(run.folder / "checkpoints" / "step-00000002", {"w": torch.ones(1)}, {}, {})
    assert not ended("data.fraction=0.5")  # trained again
    write_result(evaluation, old)
    assert ended()
    write_files(run.folder / "checkpoints" / "step-00000004", {"w": torch.zeros(1)}, {}, {})
    assert not ended()
    shutil.rmtree(run.folder / "checkpoints")
    assert ended()
    # Newer versions leave it in another folder, which counts first.
    evaluation = run.folder / "analysis" / "linear_eval_simclr.json"
    write_result(evaluation, old | {"top1": 50.0, "lr": 0.2})
    assert ended() and ended("--lr", "0.2")
    found.score, found.linear_eval = "linear_top1", ["--preset", "simclr", "--lr", "0.2"]
    (run,) = found.runs(path, tmp_path, ["data.path=/images"])
    assert run.results[1]["top1"] == 50.0


@pytest.mark.slow
def test_lines_of_rows_that_are_no_longer_in_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = table(tmp_path)
    before = named(path, "A", "B", "C")
    ended = before.runs(path, tmp_path, [])
    for run in ended:
        finish(run)
    assert write_down(path, before, ended) == ["A", "B", "C"] and not capsys.readouterr().err
    after = named(path, "D", "a", "C")  # the log of a is that of A
    new = after.runs(path, tmp_path, [])
    finish(new[0])
    assert write_down(path, after, new[:2]) == ["D", "a", "C", "B"]
    assert "'B', seed 0, is not in the table: kept" in capsys.readouterr().err
    written = path.parent / "digits-cpu.csv"
    text, logs = written.read_text(), path.parent / "logs" / "digits-cpu"
    (logs / "c-seed0.jsonl").unlink()
    (logs / "d-seed0.jsonl").unlink()
    with pytest.raises(
        UserError, match=r"digits-cpu.csv: .*c-seed0.jsonl is missing: .* remove the line 'C'"
    ):
        write_down(path, after, new[:2])
    assert written.read_text() == text and not (logs / "d-seed0.jsonl").exists()
    (logs / "b-seed0.jsonl").unlink()
    assert write_down(path, after, new) == ["D", "a", "C"]
    assert "'B', seed 0, is not in the table: dropped" in capsys.readouterr().err


def test_two_that_write_down_at_once_lose_no_line(tmp_path: Path) -> None:
    path = table(tmp_path)
    found = named(path, "A", "B")
    ended = found.runs(path, tmp_path, [])
    for run in ended:
        finish(run)
    assert write_down(path, found, ended[:1]) == ["A"]
    written = path.parent / "digits-cpu.csv"
    ours = written.read_text()
    written.unlink()
    with (path.parent / ".digits.yaml.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other = threading.Thread(target=write_down, args=(path, found, ended[1:]))
        other.start()
        other.join(1.0)
        written.write_text(ours)
    other.join()
    assert [line["row"] for line in csv.DictReader(written.open())] == ["A", "B"]
