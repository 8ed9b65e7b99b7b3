"""Tables of results: a row that is stopped goes on, and the CSV says what its run left."""

from __future__ import annotations

import csv
import fcntl
import json
import re
import runpy
import shutil
import signal
import statistics
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from framework.analysis import results_records
from framework.analysis.results_records import csv_of
from framework.analysis.results_runs import Row
from framework.analysis.results_tables import ResultsTable
from framework.config import loading
from framework.runtime.errors import UserError
from framework.runtime.exit_status import EXIT_TRY_AGAIN, EXIT_USAGE
from framework.tracking.environment import device_name
from framework.tracking.metric_log import read_log
from tests.support.forked import forked_tool
from tests.support.results import finish, named, reproduce, table
from tests.support.runs import ROOT, losses, starts
from tests.support.waiting import until

TABLES = sorted((ROOT / "recipes" / "results").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.usefixtures("pool")  # its server forks the tool that is stopped
def test_a_row_is_stopped_and_goes_on(tmp_path: Path) -> None:
    path, run = table(tmp_path), tmp_path / "runs" / "digits" / "dglstar-k-2-seed0"
    (tmp_path / "run").symlink_to(run)
    arguments = [str(path), f"data.path={tmp_path / 'digits'}", "--runs", str(tmp_path / "runs")]
    log_file = run / "metrics.jsonl"
    with forked_tool(tmp_path / "stopped", "reproduce", *arguments) as tool:
        until(lambda: log_file.exists() and log_file.read_text().count("losses") >= 7)
        tool.signal(signal.SIGTERM)
        assert tool.status() == EXIT_TRY_AGAIN
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
    assert tool["Work"](time.monotonic() + tool["SHORTEST"]).all_of([run]) == EXIT_TRY_AGAIN
    assert not list(run.folder.glob("*")), "nothing was trained"
    assert reproduce(str(path), "--minutes", "1") == 64
    assert "--minutes 1: must be above 1.08" in capsys.readouterr().err


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


def test_a_run_of_other_settings_is_not_taken_for_the_rows(tmp_path: Path) -> None:
    path = table(tmp_path)
    (run,) = ResultsTable.read(path).runs(path, tmp_path, ["data.path=a"])
    run.folder.mkdir(parents=True)
    (run.folder / "recipe.yaml").write_text(loading.to_yaml(loading.load(run.steps[0].command[1:])))
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


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, id=p.stem, marks=[] if "8ep" in p.stem or "14_ssl" in p.stem else [pytest.mark.slow])
        for p in TABLES
    ],
)
def test_every_table_is_sound_and_its_name_says_its_conditions(path: Path) -> None:
    """Epochs, batch and number of images as in the name; nothing but the method differs between rows."""
    found = ResultsTable.read(path)
    recipes = [
        loading.load([*run.steps[0].command[1:], "data.path=x"]) for run in found.runs(path, Path("runs"), [])
    ]
    assert len({repr((r.optim, r.train, r.data, r.views, r.evaluate)) for r in recipes}) == 1
    first, name = recipes[0], path.stem.split("_")
    assert f"{first.train.epochs}ep" in name and f"b{first.train.batch_size}" in name
    share = [int(word[1:]) for word in name if word[0] == "n" and word[1:].isdigit()]
    assert first.data.fraction == (share[0] / 50_000 if share else 1.0)
    assert f"tools/reproduce.py recipes/results/{path.name}" in path.read_text()


@pytest.mark.slow
def test_what_a_csv_has_is_not_trained_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In a fresh clone, which has no run folders; unless asked for, or recorded with other settings."""
    path, runs = table(tmp_path), tmp_path / "elsewhere"
    found = named(path, "A", "B", seeds=[0, 1])
    device = device_name(torch.device("cpu"))
    for run in found.runs(path, runs, []):
        finish(run, device)
    results_records.write_down(path, found, found.runs(path, runs, []))
    shutil.rmtree(runs)
    before = csv_of(path, device).read_text()
    new = [str(path), "data.path=/nowhere", "--runs", str(tmp_path / "runs")]
    assert reproduce(*new) == 0
    assert csv_of(path, device).read_text() == before and not (tmp_path / "runs").exists()
    capfd.readouterr()
    assert reproduce(*new, "--again", "--rows", "B", "data.prepare=none") == EXIT_USAGE
    assert capfd.readouterr().err.count("failed, see above") == 2
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    assert reproduce(*new, "--rows", "A", "data.prepare=none", "optim.lr=0.3") == EXIT_USAGE
    said = capfd.readouterr()
    assert "not skipped: 'A', seed 1: its line had optim.lr=0.2, and the table has 0.3" in said.err
    # 64 images, one epoch, ten a second, says the line
    assert "A, seed 0: 0 min" in said.out and "about 0 min with --jobs 1\n" in said.out


@pytest.mark.slow
@pytest.mark.usefixtures("pool")  # its server forks the tool that is killed
def test_rows_at_a_time_survive_a_kill(tmp_path: Path) -> None:
    """The rows at work end without the tool, and the next start waits for none and trains none twice."""
    path, runs = table(tmp_path), tmp_path / "runs" / "digits"
    short = json.loads(path.read_text())["overrides"]
    named(path, "A", "B", overrides=[*short, "data.workers=0"])
    arguments = [
        str(path),
        f"data.path={tmp_path / 'digits'}",
        "--runs",
        str(tmp_path / "runs"),
        "--jobs",
        "2",
    ]
    logs = [runs / f"{row}-seed0" / "metrics.jsonl" for row in "ab"]
    with forked_tool(tmp_path / "killed", "reproduce", *arguments) as tool:
        until(lambda: all(log.exists() and log.read_text().count("losses") >= 3 for log in logs))
        tool.signal(signal.SIGKILL)
        tool.status()
    assert not list(path.parent.glob("*.csv"))
    until(lambda: all((log.parent / "result.json").exists() for log in logs))
    until(lambda: reproduce(*arguments) == 0)  # the commands keep their locks up to their last breath
    (written,) = path.parent.glob("digits-*.csv")
    assert [line["row"] for line in csv.DictReader(written.open())] == ["A", "B"]
    for log in logs:
        entries = read_log(log)
        assert sum("environment" in entry for entry in entries) == 1
        assert [entry["step"] for entry in entries if "losses" in entry] == list(range(60))


@pytest.mark.slow
def test_every_segment_of_a_run_is_looked_at_and_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = table(tmp_path, "train.max_steps=2", "data.workers=0")
    short = json.loads(path.read_text())["overrides"]
    named(path, "End to end", "A", overrides=short, layers={"reference": "End to end", "images": 100})
    arguments = [str(path), f"data.path={tmp_path / 'digits'}", "--runs", str(tmp_path / "runs")]
    assert reproduce(*arguments, "--rows", "A", "--estimate") == 0
    assert re.search(r"A, seed 0: \d+ min\nabout \d+ min with --jobs 1\n", capsys.readouterr().out)
    assert not (tmp_path / "runs").exists()
    assert reproduce(*arguments, "--rows", "A") == EXIT_TRY_AGAIN  # nothing to be compared with
    assert reproduce(*arguments) == 0
    (written,) = path.parent.glob("digits-*.csv")
    first, second = csv.DictReader(written.open())
    assert first["cka"] == "" and float(second["cka"]) == 1.0  # the same run twice
    log = json.loads((path.parent / second["log"]).read_text().splitlines()[0])
    _, probes, cka = log["results"]
    accuracies = list(probes["top1"]["a-seed0"].values())
    assert len(accuracies) == 3 and float(second["early_top1"]) == round(accuracies[0], 2)
    assert all((path.parent / f"{written.stem}{suffix}.png").exists() for suffix in ("", "-units", "-layers"))
    assert cka["reference"] == "end-to-end-seed0" and str(tmp_path) not in json.dumps(log)
    assert [command.split()[2] for command in log["commands"]] == [
        "framework/train.py",
        "tools/probe_layers.py",
        "tools/cka.py",
    ]
