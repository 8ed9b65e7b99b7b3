"""Checkpoints of which every rank writes a share: where they may go, and what survives damage and full disks."""

from __future__ import annotations

import json
import logging
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from framework import engines
from framework.checkpoints.damage import damage_of
from framework.checkpoints.folder import MANIFEST, files_of, identity_of, read_files, write_share
from framework.checkpoints.retention import Keep
from framework.checkpoints.run_checkpoints import newest_checkpoint
from framework.checkpoints.saver import Saver, save_checkpoint
from framework.checkpoints.snapshot import load_checkpoint
from framework.checkpoints.tensor_files import _TYPES, Tensors, write_tensors
from framework.engines.base import Engine, Share
from framework.runtime.distributed import rank
from framework.runtime.errors import UserError
from tests.support import pipelines, training
from tests.support.marks import slow
from tests.support.training import Case, Run, differences

PoolOf = Callable[[int], Any]
DYADIC = Case(engine="fsdp", optimizer="adamw")
LOCO = Case("loco", engine="fsdp", optimizer="adamw")
STAGES = pipelines.Run("mlaan", 2, optimizer="adamw", dtype="float32")


def test_files_are_byte_for_byte_those_of_safetensors(tmp_path: Path) -> None:
    tensors = {f"{n}.{d}": (torch.randn(3, n) * 9).to(d) for d in _TYPES for n in (1, 2)}
    tensors |= {"é": torch.tensor(3), "none": torch.empty(0, 2), "turned": torch.randn(3, 2).T}
    for about in ({}, {"cut": '{"ü": [2]}'}):
        write_tensors(tmp_path / "x", tensors, about)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        assert (tmp_path / "x").read_bytes() == save(contiguous, about or None)


def resident() -> int:
    """Bytes of files that this process has mapped and read."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))


def test_reading_holds_little_more_than_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size, count = 1 << 20, 10
    for number in range(2):
        tensors = {f"t{i}": torch.full((size // 8,), i + number / 2) for i in range(count)}
        write_tensors(
            tmp_path / str(number), tensors, {"cut": json.dumps({name: [2, size // 8] for name in tensors})}
        )
    monkeypatch.setattr("framework.checkpoints.tensor_files.REOPEN", size)
    read = Tensors([tmp_path / "0", tmp_path / "1"])
    before = resident()
    for i in range(count):
        assert read[f"t{i}"].mean(1).tolist() == [i, i + 0.5]
        assert resident() - before < 4 * size


def halves(folder: Path, others_first: bool = True) -> dict[str, Tensor]:
    """A checkpoint in two shares, written here; its model."""
    whole = {"w": torch.randn(3, 5), "b": torch.randn(1)}
    shapes = {name: list(tensor.shape) for name, tensor in whole.items()}
    for number in (1, 0) if others_first else (0,):
        cut = {n: t.flatten()[number * (k := -(-t.numel() // 2)) :][:k] for n, t in whole.items()}
        own = {"seen": torch.tensor(7)} if number == 0 else {}
        moments = {
            n: {"exp_avg": t + 1, **({"step": torch.tensor(3.0)} if own else {})} for n, t in cut.items()
        }
        write_share(
            folder, "token", Share(number, 2, cut | own, moments, shapes), {"a": 1}, patience=lambda: 0.0
        )
    return whole


def test_parts_come_back_whole(tmp_path: Path) -> None:
    whole = halves(tmp_path / "step-00000001")
    folder = tmp_path / "step-00000001"
    assert sorted(file.name for file in folder.iterdir()) == sorted([*files_of(2), MANIFEST])
    assert load_file(folder / "model-00002-of-00002.safetensors").keys() == whole.keys(), "the rest is in one"
    state, model, optimizer = read_files(folder)
    assert state == {"a": 1} and model.keys() == {*whole, "seen"}
    for name, tensor in whole.items():
        assert torch.equal(model[name], tensor) and model.shapes[name] == tensor.shape
        assert torch.equal(optimizer[name]["exp_avg"], tensor + 1) and optimizer[name]["step"] == 3
    del model["b"]
    model["more"] = torch.zeros(2, 1)
    assert {*model} == {"w", "seen", "more"} and model.shapes["more"] == (2, 1)
    first = identity_of(folder)
    halves(folder)
    assert identity_of(folder) != first, "other weights"


def test_the_first_share_waits_for_the_others_in_vain(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"model-00002-of-00002.safetensors is missing: its rank has not writt"
    ):
        halves(tmp_path / "step-00000001", others_first=False)
    assert not list(tmp_path.glob("step-*"))
    halves(tmp_path / "step-00000002")  # which clears up
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", *slow(files_of(2)[::2])])
def test_a_lost_or_flipped_file_of_a_rank_is_named(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = (tmp_path / "checkpoints" / f"step-0000000{step}" for step in (1, 2))
    halves(older)
    halves(newer)
    content = bytearray((newer / name).read_bytes())
    content[len(content) // 2] ^= 4
    for damage in (lambda: (newer / name).write_bytes(content), (newer / name).unlink):
        damage()
        caplog.clear()
        assert newest_checkpoint(tmp_path) == older
        (record,) = caplog.records
        assert f"step-00000002: passed over: {name}" in record.getMessage()
    assert damage_of(older) is None


def states(engine: Engine) -> Run:
    return Run(engine.model_state(), engine.optimizer_state(), torch.zeros(1))


def save_one(case: Case, run_dir: Path) -> tuple[Path, Run]:
    engine = training.build(case)
    training.advance(engine, case, range(2))
    folder = save_checkpoint(run_dir, engine, 2, {})
    run = states(engine)
    engine.close()
    return folder, run


def loaded(case: Case, folder: Path) -> Run:
    engine = training.build(case)
    load_checkpoint(folder, engine)
    run = states(engine)
    engine.close()
    return run


def load_error(case: Case, folder: Path) -> str:
    engine = training.build(case)
    try:
        load_checkpoint(folder, engine)
    except UserError as error:
        return str(error)
    finally:
        engine.close()
    return ""


def test_every_rank_writes_its_slices(pool: PoolOf, tmp_path: Path) -> None:
    """Any engine takes them, bit by bit; and one rank's lost file is one line on all."""
    folder, run = pool(2).run(save_one, DYADIC, tmp_path)[0]
    files = [load_file(folder / f"model-0000{number}-of-00002.safetensors") for number in (1, 2)]
    for name, tensor in run.model.items():
        parts = [file[name] for file in files if name in file]
        if name != "seen":
            assert len(parts) == 2 and max(part.numel() for part in parts) == -(-tensor.numel() // 2)
        assert torch.equal(torch.cat([part.flatten() for part in parts]), tensor.flatten()), name
    for ranks, case in [(2, DYADIC), (1, replace(DYADIC, engine="ddp"))]:
        assert differences(pool(ranks).run(loaded, case, folder)[0], run) == {}
    (folder / "optimizer-00002-of-00002.safetensors").unlink()
    messages = pool(2).run(load_error, DYADIC, folder)
    assert len(set(messages)) == 1 and "optimizer-00002-of-00002.safetensors can't be read" in messages[0]


ORIGINS: Any = [(4, LOCO), *((2, replace(LOCO, engine="deepspeed", zero_stage=z)) for z in (0, 2))]
TARGETS: Any = [(1, LOCO), (2, LOCO), (4, LOCO), (1, replace(LOCO, engine="ddp"))]
TARGETS += [(2, replace(LOCO, engine="deepspeed", zero_stage=z)) for z in (0, 1, 2)]


@pytest.mark.parametrize(("ranks", "origin"), slow(ORIGINS), ids=str)
def test_it_moves_between_ranks_and_engines_bit_by_bit(
    pool: PoolOf, tmp_path: Path, ranks: int, origin: Case
) -> None:
    folder, run = pool(ranks).run(save_one, origin, tmp_path)[0]
    sliced = origin.engine == "fsdp"
    assert {file.name for file in folder.iterdir()} == {*files_of(ranks if sliced else 1), MANIFEST}
    for number, target in TARGETS:
        assert differences(pool(number).run(loaded, target, folder)[0], run) == {}, (number, target)


def in_stages(folder: Path | None, run_dir: Path) -> tuple[Path | None, Run]:
    engine = pipelines.build(STAGES)
    if folder is not None:
        load_checkpoint(folder, engine)
    else:
        pipelines.advance(engine, STAGES, range(1))
        folder = save_checkpoint(run_dir, engine, 1, {})
    run = states(engine)
    engine.close()
    return folder, run


def in_slices(folder: Path, run_dir: Path) -> tuple[Path, Run, Run]:
    """Loaded from stages; and saved again, after a step."""
    net = pipelines.network(STAGES)
    engine = engines.build("fsdp", net, pipelines.factory(STAGES), engines.EngineSettings(8))
    load_checkpoint(folder, engine)
    before = states(engine)
    (batch,) = pipelines.micro_batches(replace(STAGES, micro_batches=1), net, 1, rank(), 4)
    engine.step([batch], lambda: 1e-3)
    folder, after = save_checkpoint(run_dir, engine, 2, {}), states(engine)
    engine.close()
    return folder, before, after


@pytest.mark.slow
def test_it_moves_between_stages_and_slices(pool: PoolOf, tmp_path: Path) -> None:
    folder, run = pool(2).run(in_stages, None, tmp_path)[0]
    folder, before, after = pool(4).run(in_slices, folder, tmp_path)[0]
    assert differences(before, run) == {} and differences(after, run) != {}
    assert (folder / "model-00004-of-00004.safetensors").exists()
    assert differences(pool(2).run(in_stages, folder, tmp_path)[0][1], after) == {}


@contextmanager
def small_files(on: int) -> Iterator[None]:
    """On one rank, a limit of 500 bytes a file stands in for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank() == on:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def save_on_full_disk(run_dir: Path, full: int) -> tuple[str, list[str], list[str], list[str]]:
    """Beside the training: step 2 where the disk of a rank is full, 3 where it has room, 4 where it is full."""
    engine, warnings = training.build(DYADIC), Warnings()
    logging.getLogger("framework.checkpoints.saver").addHandler(warnings)
    there = lambda: sorted(path.name for path in (run_dir / "checkpoints").iterdir())  # noqa: E731
    with Saver(run_dir, Keep(3)) as saver:
        saver.save(engine, 1, {})
        saver.wait()
        with small_files(full):
            saver.save(engine, 2, {})
            with pytest.raises(UserError):
                saver.wait()
        left = there()
        saver.save(engine, 3, {})
        saver.wait()
        with small_files(full):
            saver.save(engine, 4, {})
            with pytest.raises(UserError) as caught:
                saver.wait()
    logging.getLogger("framework.checkpoints.saver").removeHandler(warnings)
    engine.close()
    return str(caught.value), left, there(), warnings.lines


@pytest.mark.parametrize("full", [1, *slow([0])])
def test_a_full_disk_on_one_rank_is_an_error_on_all_and_leaves_the_rest(
    pool: PoolOf, tmp_path: Path, full: int
) -> None:
    results = pool(2).run(save_on_full_disk, tmp_path, full)
    for message, left, at_last, _ in results:
        assert message.startswith(f"rank {full}: ") and message.count("\n") == 0
        assert "step-00000004: can't be written: [Errno 27] File too large" in message
        assert left == ["step-00000001"] and at_last == ["step-00000001", "step-00000003"]
    assert [len(lines) for *_, lines in results] == [2, 0], "rank 0 says it"
    assert newest_checkpoint(tmp_path).name == "step-00000003"


class Fatal(Exception):
    pass


def save_while_another_is_gone(run_dir: Path) -> str:
    """Rank 1 never writes its share, and the run ends with an error."""
    engine = training.build(DYADIC, training.Dyadic())
    try:
        with Saver(run_dir, Keep()) as saver:
            if rank() == 1:
                saver._thread.submit = lambda *arguments: None  # type: ignore[method-assign, assignment]
            saver.save(engine, 1, {})
            raise Fatal
    except Fatal:
        pass
    engine.close()
    return str(saver._failure)


@pytest.mark.slow
def test_a_run_that_ends_with_an_error_does_not_wait_for_a_rank_that_is_gone(
    pool: PoolOf, tmp_path: Path
) -> None:
    message, _ = pool(2).run(save_while_another_is_gone, tmp_path)
    assert "model-00002-of-00002.safetensors is missing: its rank has not written it" in message
    assert not list((tmp_path / "checkpoints").iterdir())


def save_not_finite(run_dir: Path) -> str:
    net = training.Dyadic()
    with torch.no_grad():
        net.weights[2][-1, -1] = torch.inf  # in the last rank's slice
    engine = training.build(DYADIC, net)
    with pytest.raises(UserError) as caught:
        save_checkpoint(run_dir, engine, 1, {})
    engine.close()
    return str(caught.value)


@pytest.mark.slow
def test_a_weight_that_is_not_finite_is_found_in_any_slice(pool: PoolOf, tmp_path: Path) -> None:
    messages = pool(2).run(save_not_finite, tmp_path)
    assert messages == ["rank 1: weights.2 is not finite after step 1; earlier checkpoints are untouched"] * 2
    assert not list(tmp_path.iterdir())
