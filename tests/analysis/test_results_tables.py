"""Tables of results: a row that is stopped goes on, and the CSV says what its run left."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import runpy
import shutil
import signal
import statistics
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from framework.analysis import results_records
from framework.analysis.results_tables import ResultsTable, Row, RowRun
from framework.checkpoints.folder import identity_of, write_files
from framework.config import loading
from framework.runtime.errors import UserError
from framework.runtime.exit_status import EXIT_TRY_AGAIN, EXIT_USAGE
from framework.tracking.metric_log import MetricLog, read_log, write_result
from tests.support.commands import run_tool
from tests.support.runs import ROOT, losses, starts

TABLES = sorted((ROOT / "recipes" / "results").glob("*.yaml"))


def table(folder: Path, *more: str) -> Path:
    """A table of one row that trains some seconds on digits."""
    recipe = ROOT / "recipes" / "quickstart_mlaan.yaml"
    short = [
        "train.epochs=12",
        "engine=ddp",
        "network.name=resnet8",
        "evaluate.every_epochs=6",
        "data.fraction=0.5",
    ]
    rows = [{"name": "DGL* K=2", "recipe": str(recipe), "paper": 1.5}]
    path = folder / "results" / "digits.yaml"
    path.parent.mkdir(exist_ok=True)
    overrides = [*short, "evaluate.knn=false", *more]
    path.write_text(
        json.dumps({"title": "digits", "score": "test_top1", "overrides": overrides, "rows": rows})
    )
    return path


def reproduce(*arguments: str) -> object:
    """Exit status of the tool."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        return run_tool("reproduce", *arguments)
    finally:
        signal.signal(signal.SIGTERM, before)


def terminate_after(steps: int, folder: Path) -> None:
    """TERM to this process as soon as the run in ``folder`` has made so many steps."""
    log = folder / "run" / "metrics.jsonl"
    while not log.exists() or log.read_text().count("losses") < steps:
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_a_row_is_stopped_and_goes_on(tmp_path: Path) -> None:
    path, run = table(tmp_path), tmp_path / "runs" / "digits" / "dglstar-k-2-seed0"
    (tmp_path / "run").symlink_to(run)
    arguments = [str(path), f"data.path={tmp_path / 'digits'}", "--runs", str(tmp_path / "runs")]
    threading.Thread(target=terminate_after, args=(7, tmp_path), daemon=True).start()
    assert reproduce(*arguments) == EXIT_TRY_AGAIN
    assert 7 <= len(losses(tmp_path)) < 60 and not (run / "result.json").exists()
    assert list(path.parent.iterdir()) == [path]
    for _ in range(2):  # nothing is left to do the second time
        assert reproduce(*arguments) == 0
        assert len(losses(tmp_path)) == 60 and starts(tmp_path) == 2
    result = json.loads((run / "result.json").read_text())
    (written,) = path.parent.glob("digits-*.csv")
    (line,) = csv.DictReader(written.open())
    for key in ("test_top1", "train_images", "epochs", "device", "threads", "commit"):
        assert line[key] == str(result[key])
    speeds = [e["images_per_second"] for e in read_log(run / "metrics.jsonl") if "losses" in e]
    assert float(line["images_per_second"]) == round(statistics.median(speeds), 2)  # of both starts
    assert (line["row"], line["seed"], line["batch_size"]) == ("DGL* K=2", "0", "128")
    assert float(line["error"]) == round(100 - result["test_top1"], 2) and float(line["paper_error"]) == 1.5
    log = [json.loads(text) for text in (path.parent / line["log"]).read_text().splitlines()]
    assert log[0]["results"] == [result] and str(tmp_path) not in json.dumps(log)
    (command,) = log[0]["commands"]
    shown = "python framework/train.py recipes/quickstart_mlaan.yaml train.epochs=12 "
    assert command.startswith(f"OMP_NUM_THREADS={result['threads']} {shown}")
    assert command.endswith(" seed=0 run_dir=runs/digits/dglstar-k-2-seed0")
    # A machine that has not run this row keeps its line, and its curve.
    elsewhere = written.read_text().replace("DGL* K=2,0,", "Elsewhere,0,")
    written.write_text(elsewhere)
    two = json.loads(path.read_text())
    two["rows"].insert(0, {"name": "Elsewhere", "recipe": str(ROOT / "recipes" / "quickstart.yaml")})
    found = ResultsTable(two["title"], two["score"], [Row(**row) for row in two["rows"]])
    ended = ResultsTable.read(path).runs(path, tmp_path / "runs", arguments[1:2])
    assert [row["row"] for row in results_records.write_down(path, found, ended)] == ["Elsewhere", "DGL* K=2"]
    assert [row["row"] for row in csv.DictReader(written.open())] == ["Elsewhere", "DGL* K=2"]
    during = log[1]["scores"]["test_top1"]
    assert during["epochs"] == [6.0]
    assert float(line["best_error"]) == round(100 - max(result["test_top1"], *during["top1"]), 2)
    assert log[-1] == {
        "epoch": 12.0,
        "losses": {unit: pytest.approx(loss, abs=1e-4) for unit, loss in losses(tmp_path)[-1].items()},
    }
    assert written.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def finish(run: RowRun) -> None:
    """The files of a run that has ended."""
    run.folder.mkdir(parents=True)
    (run.folder / "recipe.yaml").write_text(loading.to_yaml(loading.load(run.commands[0][1:])))
    environment = {"device": "CPU", "threads": 3, "commit": "c"}
    log = MetricLog(run.folder / "metrics.jsonl", environment)
    for step, loss in enumerate((2.0, 1.0)):
        log.write(step, epoch=step / 2, lr=0.1, losses={"unit": loss}, images_per_second=10.0)
    log.close()
    result = {"test_top1": 90.0, "train_images": 64, "epochs": 1.0}
    (run.folder / "result.json").write_text(json.dumps(result))


def named(path: Path, *names: str, **more: Any) -> ResultsTable:
    """Write and read a table with such rows."""
    table(path.parent.parent)
    (row,) = json.loads(path.read_text())["rows"]
    rows = [row | {"name": name} for name in names]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rows": rows} | more))
    return ResultsTable.read(path)


def write_down(path: Path, found: ResultsTable, ended: list[RowRun]) -> list[str]:
    """Rows of the CSV after it is written."""
    results_records.write_down(path, found, ended)
    return [line["row"] for line in csv.DictReader((path.parent / "digits-cpu.csv").open())]


@pytest.mark.slow
def test_rows_that_cannot_go_on_do_not_hinder_others(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One is locked, one fails, one is locked, one has ended."""
    (tmp_path / "digits").mkdir()  # where the run folders are
    path = table(tmp_path)
    short = json.loads(path.read_text())["overrides"]
    bad = [*short, "data.prepare=none", "data.path=/nowhere"]
    found = named(path, "Locked", "Fails", "Locked too, as it is", "Ended", overrides=bad)
    finish(found.runs(path, tmp_path, [])[3])
    with ExitStack() as locks:
        for name in ("locked", "locked-too-as-it-is"):
            lock = locks.enter_context((tmp_path / "digits" / f".{name}-seed0.lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        assert reproduce(str(path), "--runs", str(tmp_path)) == EXIT_USAGE
        said = capfd.readouterr().err
        places = [
            said.index(f"digits/{name}-seed0: {what}")
            for name, what in (
                ("locked", "skipped, for another process trains there"),
                ("fails", "failed, see above: python "),
                ("locked-too-as-it-is", "skipped, for another process trains there"),
            )
        ]
        assert places == sorted(places)
        (written,) = path.parent.glob("digits-*.csv")
        assert [line["row"] for line in csv.DictReader(written.open())] == ["Ended"]
        written.unlink()
        some = [str(path), "--runs", str(tmp_path), "--rows"]
        assert reproduce(*some, "Locked too, as it is,Locked") == EXIT_TRY_AGAIN
    assert "0 of 2 runs have ended" in capfd.readouterr().out and written.exists()
    assert reproduce(*some, "ended") == 0
    assert reproduce(*some, "Ended,Lock") == EXIT_USAGE
    known = "locked, fails, locked-too-as-it-is, ended"
    assert capfd.readouterr().err == f"error: --rows: no row 'Lock'; the table has {known}\n"


def test_nothing_is_started_shortly_before_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = table(tmp_path)
    (run,) = ResultsTable.read(path).runs(path, tmp_path, [f"data.path={tmp_path / 'digits'}"])
    tool = runpy.run_path(str(ROOT / "tools" / "reproduce.py"))
    before = time.monotonic()
    assert tool["work"]([run], before + 15) == EXIT_TRY_AGAIN
    assert time.monotonic() - before < 10 and not run.folder.exists()
    assert reproduce(str(path), "--minutes", "1") == 2
    assert "--minutes 1: must be above 1.08" in capsys.readouterr().err


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
def test_a_table_asks_for_another_linear_evaluation(tmp_path: Path) -> None:
    path = table(tmp_path, "train.max_steps=2", "data.workers=0")
    short = json.loads(path.read_text())["overrides"]
    arguments = [str(path), f"data.path={tmp_path / 'digits'}", "--runs", str(tmp_path / "runs")]
    results = []
    for epochs in ("2", "2", "3"):
        asked = ["--preset", "simclr", "--cached", "--batch-size", "64", "--epochs", epochs]
        named(path, "A", score="linear_top1", linear_eval=asked, overrides=short)
        assert reproduce(*arguments) == 0
        (log,) = path.parent.glob("logs/*/a-seed0.jsonl")
        results.append(json.loads(log.read_text().splitlines()[0])["results"][1])
    assert [result["epochs"] for result in results] == [2, 2, 3]
    assert results[0] == results[1] and results[0]["weights"] == results[2]["weights"]
    (tmp_path / "run").symlink_to(tmp_path / "runs" / "digits" / "a-seed0")
    assert starts(tmp_path) == 1


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


def test_a_run_of_other_settings_is_not_taken_for_the_rows(tmp_path: Path) -> None:
    path = table(tmp_path)
    (run,) = ResultsTable.read(path).runs(path, tmp_path, ["data.path=a"])
    run.folder.mkdir(parents=True)
    (run.folder / "recipe.yaml").write_text(loading.to_yaml(loading.load(run.commands[0][1:])))
    ResultsTable.read(path).runs(path, tmp_path, ["data.path=b"])  # the images may lie elsewhere
    with pytest.raises(UserError, match=r"recipe.yaml: optim.lr is 0.2 there and 0.3 in the table: remove"):
        ResultsTable.read(path).runs(path, tmp_path, ["data.path=a", "optim.lr=0.3"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title: t\nscore: test_top1\nrows: [{name: A b, recipe: x}, {name: a-B, recipe: x}]", "a-b, a-b"),
        ("title: t\nscore: linear_top1\nrows: []", "linear_eval goes with score=linear_top1"),
        ("title: t\nscore: linear_top1\nrows: []\nlinear_eval: [--cached]", "must name a --preset"),
        (
            "title: t\nscore: linear_top1\nrows: []\nlinear_eval: [--preset, loko]",
            "linear_eval: argument --preset: invalid choice: 'loko'",
        ),
        ("title: t\nscore: test_top1\nrows: []\nseed: 1", "seed: unknown key"),
    ],
)
def test_a_wrong_table_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"wrong.yaml: .*{message}"):
        ResultsTable.read(path)


@pytest.mark.parametrize("path", TABLES, ids=[path.stem for path in TABLES])
def test_every_table_is_sound_and_its_name_says_its_conditions(path: Path) -> None:
    """Epochs, batch and number of images as in the name; nothing but the method differs between rows."""
    found = ResultsTable.read(path)
    recipes = [
        loading.load([*run.commands[0][1:], "data.path=x"]) for run in found.runs(path, Path("runs"), [])
    ]
    assert len({repr((r.optim, r.train, r.data, r.views, r.evaluate)) for r in recipes}) == 1
    first, name = recipes[0], path.stem.split("_")
    assert f"{first.train.epochs}ep" in name and f"b{first.train.batch_size}" in name
    share = [int(word[1:]) for word in name if word[0] == "n" and word[1:].isdigit()]
    assert first.data.fraction == (share[0] / 50_000 if share else 1.0)
    assert f"tools/reproduce.py recipes/results/{path.name}" in path.read_text()
