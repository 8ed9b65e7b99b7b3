"""Tables of results: a row that is stopped goes on, and the CSV says what its run left."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import runpy
import signal
import statistics
import threading
import time
from pathlib import Path

import pytest
from commands import run_tool
from runs import ROOT, losses, starts

from framework import config
from framework.analysis.evidence import EvidenceTable, Row
from framework.control import GO_ON_LATER
from framework.errors import UserError
from framework.metrics import read_log

TABLES = sorted((ROOT / "recipes" / "results").glob("*.yaml"))


def table(folder: Path, *more: str) -> Path:
    """A table of one row that trains some seconds on digits."""
    recipe = ROOT / "recipes" / "quickstart_mlaan.yaml"
    short = [
        "train.epochs=12",
        "engine=ddp",
        "network.name=resnet8",
        "evaluate.every_epochs=6",
        "data.share=0.5",
    ]
    rows = [{"name": "DGL* K=2", "recipe": str(recipe), "paper": 1.5}]
    path = folder / "results" / "digits.yaml"
    path.parent.mkdir(exist_ok=True)
    overrides = [*short, "evaluate.knn=false", *more]
    path.write_text(
        json.dumps({"title": "digits", "score": "test_top1", "overrides": overrides, "rows": rows})
    )
    return path


def evidence(*arguments: str) -> object:
    """Exit status of the tool."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        return run_tool("evidence", *arguments)
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
    assert evidence(*arguments) == GO_ON_LATER
    assert 7 <= len(losses(tmp_path)) < 60 and not (run / "result.json").exists()
    assert list(path.parent.iterdir()) == [path]
    for _ in range(2):  # nothing is left to do the second time
        assert evidence(*arguments) == 0
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
    assert command.startswith("python framework/train.py recipes/quickstart_mlaan.yaml train.epochs=12 ")
    assert command.endswith(" seed=0 run_dir=runs/digits/dglstar-k-2-seed0")
    # A machine that has not run this row keeps its line, and its curve.
    elsewhere = written.read_text().replace("DGL* K=2,0,", "Elsewhere,0,")
    written.write_text(elsewhere)
    two = json.loads(path.read_text())
    two["rows"].insert(0, {"name": "Elsewhere", "recipe": str(ROOT / "recipes" / "quickstart.yaml")})
    found = EvidenceTable(two["title"], two["score"], [Row(**row) for row in two["rows"]])
    ended = EvidenceTable.read(path).runs(path, tmp_path / "runs", arguments[1:2])
    tool = runpy.run_path(str(ROOT / "tools" / "evidence.py"))
    assert [row["row"] for row in tool["write_down"](path, found, ended)] == ["Elsewhere", "DGL* K=2"]
    assert [row["row"] for row in csv.DictReader(written.open())] == ["Elsewhere", "DGL* K=2"]
    during = log[1]["scores"]["test_top1"]
    assert during["epochs"] == [6.0]
    assert float(line["best_error"]) == round(100 - max(result["test_top1"], *during["top1"]), 2)
    assert log[-1] == {
        "epoch": 12.0,
        "losses": {unit: pytest.approx(loss, abs=1e-4) for unit, loss in losses(tmp_path)[-1].items()},
    }
    assert written.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_two_do_not_train_a_row_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "digits").mkdir()
    with (tmp_path / "digits" / ".dglstar-k-2-seed0.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert evidence(str(table(tmp_path)), "data.path=x", "--runs", str(tmp_path)) == GO_ON_LATER
    assert (
        "dglstar-k-2-seed0: another process trains there; wait for it, or end it" in capsys.readouterr().err
    )


def test_a_run_of_other_settings_is_not_taken_for_the_rows(tmp_path: Path) -> None:
    path = table(tmp_path)
    (run,) = EvidenceTable.read(path).runs(path, tmp_path, ["data.path=a"])
    run.folder.mkdir(parents=True)
    (run.folder / "recipe.yaml").write_text(config.to_yaml(config.load(run.commands[0][1:])))
    EvidenceTable.read(path).runs(path, tmp_path, ["data.path=b"])  # the images may lie elsewhere
    with pytest.raises(UserError, match=r"recipe.yaml: optim.lr is 0.2 there and 0.3 in the table: remove"):
        EvidenceTable.read(path).runs(path, tmp_path, ["data.path=a", "optim.lr=0.3"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title: t\nscore: test_top1\nrows: [{name: A b, recipe: x}, {name: a-B, recipe: x}]", "a-b, a-b"),
        ("title: t\nscore: linear_top1\nrows: []", "linear_eval goes with score=linear_top1"),
        ("title: t\nscore: linear_top1\nrows: []\nlinear_eval: [--cached]", "must name a --preset"),
        ("title: t\nscore: test_top1\nrows: []\nseed: 1", "seed: unknown key"),
    ],
)
def test_a_wrong_table_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"wrong.yaml: .*{message}"):
        EvidenceTable.read(path)


@pytest.mark.parametrize("path", TABLES, ids=[path.stem for path in TABLES])
def test_every_table_is_sound_and_its_name_says_its_conditions(path: Path) -> None:
    """Epochs, batch and number of images as in the name; nothing but the method differs between rows."""
    found = EvidenceTable.read(path)
    recipes = [
        config.load([*run.commands[0][1:], "data.path=x"]) for run in found.runs(path, Path("runs"), [])
    ]
    assert len({repr((r.optim, r.train, r.data, r.views, r.evaluate)) for r in recipes}) == 1
    first, name = recipes[0], path.stem.split("_")
    assert f"{first.train.epochs}ep" in name and f"b{first.train.batch_size}" in name
    share = [int(word[1:]) for word in name if word[0] == "n" and word[1:].isdigit()]
    assert first.data.share == (share[0] / 50_000 if share else 1.0)
    assert f"tools/evidence.py recipes/results/{path.name}" in path.read_text()
