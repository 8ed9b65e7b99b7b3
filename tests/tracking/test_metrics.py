"""The log of a run, its progress display and its picture."""

from __future__ import annotations

import io
import json
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image
from rich.console import Console

from framework.analysis.curves import loss_curves, read_losses
from framework.runtime.errors import UserError
from framework.tracking import environment as surroundings
from framework.tracking.environment import commit, environment
from framework.tracking.measuring import PeakMemory, Throughput
from framework.tracking.metric_log import MetricLog, read_log, write_result
from framework.tracking.progress import Progress
from tests.support.marks import slow


def write_steps(log: MetricLog, steps: range, units: int = 3) -> None:
    for step in steps:
        losses = {f"layer{u}": (u + 1) * np.exp(-step / 50) + 0.01 for u in range(units)}
        log.write(step, epoch=step / 10, lr=0.1, losses=losses, images_per_second=100.0)


def test_resuming_drops_what_lies_past_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricLog(path, {"world_size": 2})
    write_steps(log, range(10))
    log.close()
    log = MetricLog(path, {"world_size": 4}, step=6)
    write_steps(log, range(6, 12))
    log.close()
    entries = read_log(path)
    assert [e["step"] for e in entries if "losses" in e] == list(range(12))
    assert [(e["step"], e["environment"]["world_size"]) for e in entries if "environment" in e] == [
        (0, 2),
        (6, 4),
    ]
    assert entries[7]["environment"] == {"world_size": 4}, "a restart stands between the steps it separates"


def test_starting_again_from_the_first_step_leaves_only_the_starts(tmp_path: Path) -> None:
    for start in range(3):
        log = MetricLog(tmp_path / "m.jsonl", {"start": start})
        write_steps(log, range(3))
        log.close()
    entries = read_log(tmp_path / "m.jsonl")
    assert [e["step"] for e in entries] == [0, 0, 0, 0, 1, 2]
    assert [e["environment"]["start"] for e in entries[:3]] == [0, 1, 2]


def test_a_step_is_on_disk_when_write_returns(tmp_path: Path) -> None:
    log = MetricLog(tmp_path / "m.jsonl", {})
    log.write(0, epoch=0.5, lr=0.1, losses={"a": 2.5}, skipped=True)
    expected = {"step": 0, "epoch": 0.5, "lr": 0.1, "losses": {"a": 2.5}, "skipped": True}
    assert read_log(tmp_path / "m.jsonl")[1] == expected
    log.close()


def test_a_torn_last_line_is_forgiven_and_any_other_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    log = MetricLog(path, {})
    write_steps(log, range(3))
    log.close()
    whole = path.read_text()
    path.write_text(whole[:-20])
    assert [e["step"] for e in read_log(path)] == [0, 0, 1]
    MetricLog(path, {}, step=2).close()
    assert [e["step"] for e in read_log(path)] == [0, 0, 1, 2]
    path.write_text(whole.replace('"step": 1', "step 1"))
    with pytest.raises(UserError, match=r"m.jsonl, line 3: not a line of JSON"):
        read_log(path)


@pytest.mark.parametrize("line", [b"5\n", b"\xff\n", b"\0\0\n", b'{"epoch": 1, "losses": {}}\n', b"[1\n"])
def test_a_damaged_line_is_named_before_a_run_goes_on(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "m.jsonl"
    log = MetricLog(path, {})
    write_steps(log, range(3))
    log.close()
    path.write_bytes(path.read_bytes() + line)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"m.jsonl, line 5: not a line of"):
        read_log(path)
    with pytest.raises(UserError, match=r"m.jsonl, line 5: not a line of a log; mend it or take it out"):
        MetricLog(path, {}, step=3)
    assert path.read_bytes() == before


def test_numbers_that_are_not_finite_stay_readable(tmp_path: Path) -> None:
    log = MetricLog(tmp_path / "m.jsonl", {})
    log.write(0, epoch=0.0, lr=0.1, losses={"a": float("nan"), "b": float("inf"), "c": 1.0})
    log.close()
    assert "NaN" not in (tmp_path / "m.jsonl").read_text()
    assert read_log(tmp_path / "m.jsonl")[1]["losses"] == {"a": None, "b": None, "c": 1.0}


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file can grow beyond ``limit`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_named_and_the_previous_result_survives(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    write_result(result, {"knn_top1": 97.5})
    with full_disk(200), pytest.raises(UserError, match=r"result.json: can't be written: .+"):
        write_result(result, {"text": "x" * 1000})
    assert json.loads(result.read_text()) == {"knn_top1": 97.5}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_a_log_waits_for_room_on_the_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = MetricLog(tmp_path / "m.jsonl", {})
    with full_disk(200):
        write_steps(log, range(10))
    assert (tmp_path / "m.jsonl").stat().st_size == 200, "a line was cut in two"
    assert [r.getMessage().count("can't be written") for r in caplog.records] == [1]
    write_steps(log, range(10, 12))
    log.close()
    assert [e["step"] for e in read_log(tmp_path / "m.jsonl")] == [0, *range(12)]


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as this one, in a checkout that is run as it lies."""
    monkeypatch.setattr(surroundings, "PACKAGES", ("torch", "no-such-package"))
    found = environment(1, torch.device("cpu"))["versions"]
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["no-such-package"] == "not installed"


def test_throughput_leaves_the_first_step_out() -> None:
    times = iter([100.0, 101.0, 103.0, 103.5])
    speed = Throughput(window=2, clock=lambda: next(times))
    assert [speed.step(10) for _ in range(4)] == [0.0, 10.0, pytest.approx(20 / 3), pytest.approx(20 / 2.5)]
    assert speed.mean == pytest.approx(30 / 3.5)
    assert Throughput().mean == 0.0


def test_throughput_goes_on_and_leaves_pauses_out() -> None:
    times = iter([100.0, 101.0, 150.0, 250.0, 252.0])  # two steps, a pause of 100 seconds, another step
    speed = Throughput(images=40, seconds=1.0, clock=lambda: next(times))
    speed.step(10), speed.step(10)
    with speed.paused():
        pass
    assert speed.step(10) == pytest.approx(20 / 52)
    assert (speed.images, speed.seconds) == (60, 53.0)
    assert speed.mean == pytest.approx(60 / 53)


class Clock:
    """Time passes only where a test lets it."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_share_of_waiting_is_that_of_timed_steps_outside_pauses() -> None:
    clock = Clock()
    speed = Throughput(window=2, clock=clock)

    def slow_loader() -> Iterator[int]:
        for seconds in (50.0, 3.0, 1.0, 0.0):  # the first fills its queues
            clock.now += seconds
            yield 10

    shares = []
    for images in speed.waiting(slow_loader()):
        clock.now += 2
        speed.step(images)
        shares.append(speed.waited_lately)
        with speed.paused():
            clock.now += 1000
    assert shares == [0.0, 3 / 5, 4 / 8, 1 / 5]
    assert (speed.waited, speed.seconds, speed.mean_waited) == (4.0, 10.0, 0.4)
    again = Throughput(speed.images, speed.seconds, clock=clock, waited=speed.waited)
    assert again.mean_waited == 0.4 and again.waited_lately == 0.0 and Throughput().mean_waited == 0.0


def progress(steps: int, units: int, **options: object) -> str:
    console = Console(file=io.StringIO(), width=80, height=50, **options)  # type: ignore[arg-type]
    with Progress(steps, console=console, interval=1e9) as bar:
        for step in range(steps):
            losses = {f"unit{u}": u + step / 1000 for u in range(units)}
            bar.update(step, epoch=step / 4, losses=losses, images_per_second=1234.4)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_without_a_terminal_there_are_plain_lines_now_and_then() -> None:
    lines = progress(steps=20, units=54).splitlines()
    assert len(lines) == 2, "the first and the last step; the interval is too long for others"
    assert lines[1].startswith("step 20/20  epoch 4.8  1234 images/s  unit0 0.019  unit1 1.019")
    assert lines[1].endswith("unit53 53.019")
    assert "\x1b" not in lines[1]


@pytest.mark.parametrize("terminal", [False, True])
def test_utilization_stands_behind_the_speed(terminal: bool) -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=terminal)
    with Progress(1, console=console) as bar:
        bar.update(0, epoch=0.1, losses={"a": 1.0}, images_per_second=1234.4, mfu=0.406)
    assert "1234 images/s, MFU 41%" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("terminal", [False, True])
def test_other_ranks_show_nothing(terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal)
    with Progress(2, enabled=False, console=console) as bar:
        bar.update(1, epoch=0.0, losses={"a": 1.0}, images_per_second=1.0)
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]


def test_a_terminal_shows_the_bar_and_every_unit() -> None:
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", progress(steps=20, units=54, force_terminal=True))
    last = text[text.rindex("epoch") :]
    assert "epoch 4.8" in last and "20/20" in last and "1234 images/s" in last
    assert [int(n) for n in re.findall(r"unit(\d+) \d+\.019", last)] == list(range(54))


def image(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3).astype(int)


def shows(pixels: np.ndarray, position: float) -> bool:
    """Whether a curve has the color of a unit at ``position`` (0 lowest, 1 highest)."""
    color = 255 * np.array(colormaps["viridis"](0.05 + 0.8 * position)[:3])
    return int((abs(pixels - color).max(1) < 3).sum()) > 200


@pytest.mark.parametrize(("units", "steps"), [(1, 200), (3, 200), (3, 2), *slow([(54, 200)])])
def test_the_picture_shows_every_unit(tmp_path: Path, units: int, steps: int) -> None:
    log = MetricLog(tmp_path / "m.jsonl", {})
    write_steps(log, range(steps), units)
    log.write(steps, epoch=1.0, lr=0.1, losses={f"layer{u}": float("nan") for u in range(units)})
    log.close()
    pixels = image(loss_curves(tmp_path / "m.jsonl", title="a run"))
    assert all(shows(pixels, u / max(1, units - 1)) for u in range(units))
    if units == 3:
        assert not shows(pixels, 0.25), "a color that no unit has"


def test_steps_between_two_entries_count(tmp_path: Path) -> None:
    log = MetricLog(tmp_path / "m.jsonl", {})
    write_steps(log, range(9, 100, 10))
    log.close()
    assert read_losses(tmp_path / "m.jsonl").summary()["steps"] == 100


def test_a_log_without_steps_can_not_be_drawn(tmp_path: Path) -> None:
    MetricLog(tmp_path / "m.jsonl", {}).close()
    with pytest.raises(UserError, match=r"m.jsonl: no steps"):
        loss_curves(tmp_path / "m.jsonl")


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_commit_knows_clean_dirty_and_foreign_checkouts(tmp_path: Path) -> None:
    assert commit(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert commit(tmp_path) is None, "nothing is committed"
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/file").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    git(tmp_path, "tag", "-a", "v1", "-m", "a tag must not shorten the commit")
    assert commit(tmp_path) == git(tmp_path, "rev-parse", "HEAD")
    assert commit(tmp_path / "sub") is None, "a package inside somebody else's repository"
    (tmp_path / "sub/file").write_text("2")
    assert commit(tmp_path) == git(tmp_path, "rev-parse", "HEAD") + "-dirty"


def test_environment_can_be_written_and_names_what_matters(tmp_path: Path) -> None:
    found = environment(world_size=2, device=torch.device("cpu"))
    write_result(tmp_path / "result.json", found)
    assert json.loads((tmp_path / "result.json").read_text()) == found
    assert found["world_size"] == 2 and found["device"]
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert {"python", "stagewise", "deepspeed", "timm"} <= set(found["versions"])


TRIES = 5


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_in_bytes() -> None:
    def grown() -> int:
        held = resident()
        memory = PeakMemory(torch.device("cpu"))
        torch.ones(2**26).sum()
        memory.step()
        return memory.bytes - held

    assert any(grown() == pytest.approx(4 * 2**26, rel=0.1) for _ in range(TRIES))
    memory = PeakMemory(torch.device("cpu"))
    memory.step()
    status = Path("/proc/self/status").read_text()
    kernel = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])  # type: ignore[index]
    assert memory.bytes == kernel


def resident() -> int:
    """Bytes of this process in RAM. The system may take pages back at any time: tests try several times."""
    return 1024 * int(re.findall(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


@pytest.mark.skipif(sys.platform != "linux", reason="writes to /proc")
def test_memory_of_a_pause_does_not_count() -> None:
    torch.ones(2**26).sum()  # nor does what was before
    memory = PeakMemory(torch.device("cpu"))
    memory.step()
    before = memory.bytes
    with memory.paused():
        torch.ones(2**26).sum()
    memory.step()
    assert memory.bytes - before < 2**26, "a quarter of what the pause took"

    def grown() -> int:
        held = resident()
        torch.ones(2**26).sum()
        memory.step()
        assert memory.bytes < max(before, held) + 1.2 * 4 * 2**26
        return memory.bytes - held

    assert any(grown() > 0.8 * 4 * 2**26 for _ in range(TRIES))
    assert PeakMemory(torch.device("cpu"), largest=2**50).bytes == 2**50, "of an earlier start"
