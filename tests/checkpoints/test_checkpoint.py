"""Checkpoints: what comes back, where it may go, and what survives damage, full disks and kills."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import random
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from framework.checkpoints.folder import FILES, MANIFEST
from framework.checkpoints.retention import Keep
from framework.checkpoints.run_checkpoints import newest_checkpoint
from framework.checkpoints.saver import save_checkpoint
from framework.checkpoints.snapshot import export_backbone, load_checkpoint, read_model
from framework.runtime import joining
from framework.runtime.errors import UserError
from tests.support import training
from tests.support.marks import slow
from tests.support.pool import CONTEXT
from tests.support.training import Case, Run, differences, plain

PoolOf = Callable[[int], Any]
DYADIC = Case(zero_stage=1)
DECODER = {"decoder_depth": 1, "decoder_dim": 16, "decoder_heads": 2}
STATE = {"position": {"epoch": 3, "samples": 4096}, "recipe": {"name": "ü"}}


def save_after(case: Case, run_dir: Path, steps: range, keep: int = 2) -> Path:
    """Train some steps, saving after each; the last folder."""
    engine = training.build(case)
    for step in steps:
        training.advance(engine, case, range(step, step + 1))
        folder = save_checkpoint(run_dir, engine, step + 1, STATE, Keep(keep))
    engine.close()
    return folder


def load_and_go_on(case: Case, folder: Path, steps: range) -> tuple[Run, dict[str, Any]]:
    engine = training.build(case)
    state = load_checkpoint(folder, engine)
    losses = training.advance(engine, case, steps)
    run = Run(engine.model_state(), engine.optimizer_state(), losses)
    engine.close()
    return run, state


def load_in_another_precision(case: Case, folder: Path, steps: range) -> tuple[Run, str]:
    """The same, and what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        return load_and_go_on(case, folder, steps)[0], printed.getvalue()


def load_error(case: Case, folder: Path) -> str:
    engine = training.build(case)
    try:
        load_checkpoint(folder, engine)
    except UserError as error:
        return str(error)
    finally:
        engine.close()
    return ""


@pytest.mark.parametrize(
    "case",
    [
        Case(method="loco", zero_stage=2),
        *slow([Case(method="loco", engine="fsdp", optimizer="adamw")]),
        *slow([Case(method="mlaan", precision="fp16", zero_stage=1, optimizer="sgd")]),
        *slow([Case("mim", "block", "adamw", "ddp", options=DECODER, network="vit")]),
    ],
    ids=str,
)
def test_a_resumed_training_is_the_uninterrupted_one(pool: PoolOf, tmp_path: Path, case: Case) -> None:
    """Bit by bit: weights, BatchNorm statistics, loss scales, optimizer, losses."""
    folder = pool(2).run(save_after, case, tmp_path, range(2))[0]
    resumed, state = pool(2).run(load_and_go_on, case, folder, range(2, 4))[0]
    whole = pool(2).run(training.train, replace(case, steps=4))[0]
    assert differences(resumed, whole._replace(losses=whole.losses[2:])) == {}
    assert state["step"] == 2 and {key: state[key] for key in STATE} == STATE


@pytest.mark.parametrize("optimizer", ["lars", *slow(["adamw"])])
def test_it_goes_on_under_another_engine_and_number_of_ranks(
    pool: PoolOf, tmp_path: Path, optimizer: str
) -> None:
    case = Case(zero_stage=2, optimizer=optimizer)
    folder = pool(2).run(save_after, case, tmp_path, range(1))[0]
    whole = plain(replace(case, steps=3))
    expected = whole._replace(losses=whole.losses[1:])
    for ranks, other in [(4, replace(case, zero_stage=1)), (4, replace(case, engine="fsdp")), (1, case)]:
        resumed, _ = pool(ranks).run(load_and_go_on, other, folder, range(1, 3))[0]
        assert differences(resumed, expected) == {}


MOVES = [(Case("dgl", precision="fp16"), Case("dgl", precision="bf16", engine="ddp"))]
MOVES += [(Case("dgl", precision="bf16"), Case("dgl", precision="fp16", engine="fsdp"))]
MOVES += slow(
    (Case("dgl", precision="fp32", engine="ddp"), Case("dgl", precision="fp16", zero_stage=z)) for z in (0, 2)
)
MOVES += slow(
    (Case("dgl", precision="fp16", engine=e), Case("dgl", precision="fp32")) for e in ("ddp", "fsdp")
)


@pytest.mark.parametrize(("first", "second"), MOVES, ids=str)
def test_it_goes_on_in_another_precision(pool: PoolOf, tmp_path: Path, first: Case, second: Case) -> None:
    """All but the loss scales is taken over; fp16 starts with those of a fresh run."""
    folder = pool(2).run(save_after, first, tmp_path, range(1))[0]
    saved = read_model(folder)[1]
    (loaded, said), (_, nothing) = pool(2).run(load_in_another_precision, second, folder, range(0))
    assert said.startswith("train.precision is another than in ") and said.count("\n") == 1 and not nothing
    fresh = {
        name: t for name, t in training.network(second).state_dict().items() if name.startswith("scales.")
    }
    assert bool(fresh) == (second.precision == "fp16")
    expected = {name: t for name, t in saved.items() if not name.startswith("scales.")} | fresh
    assert loaded.model.keys() == expected.keys() and loaded.optimizer
    assert all(torch.equal(loaded.model[name], t) for name, t in expected.items())
    further, _ = pool(2).run(load_in_another_precision, second, folder, range(1, 3))[0]
    assert torch.isfinite(further.losses).all()


def test_nothing_in_it_is_a_pickle(pool: PoolOf, tmp_path: Path) -> None:
    folder = pool(1).run(save_after, DYADIC, tmp_path, range(1))[0]
    assert {file.name for file in folder.iterdir()} == {*FILES, MANIFEST}
    for file in folder.glob("*.json"):
        json.loads(file.read_text())
    for file in folder.glob("*.safetensors"):
        content = file.read_bytes()
        json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_flipped_bits_are_found_and_the_one_before_is_taken(
    pool: PoolOf, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    folder = pool(1).run(save_after, DYADIC, tmp_path, range(2))[0]
    content = (folder / name).read_bytes()
    for position in (0, len(content) // 2, len(content) - 1):
        damaged = bytearray(content)
        damaged[position] ^= 1 << random.Random(position).randrange(8)
        (folder / name).write_bytes(damaged)
        caplog.clear()
        assert newest_checkpoint(tmp_path).name == "step-00000001"
        (record,) = caplog.records
        assert record.levelno == logging.WARNING and "step-00000002: passed over:" in record.getMessage()
    assert "damaged" in pool(1).run(load_error, DYADIC, folder)[0]
    (folder / name).write_bytes(content)
    assert newest_checkpoint(tmp_path) == folder


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_missing_and_cut_files_are_found(pool: PoolOf, tmp_path: Path, name: str) -> None:
    folder = pool(1).run(save_after, DYADIC, tmp_path, range(2))[0]
    (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    assert newest_checkpoint(tmp_path).name == "step-00000001"
    (folder / name).unlink()
    assert newest_checkpoint(tmp_path).name == "step-00000001"


def test_all_damaged_is_an_error_and_none_at_all_is_not(pool: PoolOf, tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    pool(1).run(save_after, DYADIC, tmp_path, range(2))
    for folder in tmp_path.glob("checkpoints/*"):
        (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="all 2 checkpoints are damaged"):
        newest_checkpoint(tmp_path)


def test_what_can_not_be_read_for_the_moment_is_not_called_damaged(pool: PoolOf, tmp_path: Path) -> None:
    """Linux answers EIO to who reads its own memory at address 0: the file stands in for a failing disk."""
    newest = pool(1).run(save_after, DYADIC, tmp_path, range(2))[0]
    for folder in (newest, newest.with_name("step-00000001")):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").symlink_to("/proc/self/mem")
        if folder == newest:
            assert newest_checkpoint(tmp_path).name == "step-00000001"
    with pytest.raises(UserError, match=r"model.safetensors: can't be read for the moment") as caught:
        newest_checkpoint(tmp_path)
    assert caught.value.transient


def test_a_missing_folder_is_one_line_on_every_rank(pool: PoolOf, tmp_path: Path) -> None:
    messages = pool(2).run(load_error, DYADIC, tmp_path / "nothing")
    assert messages[0] == messages[1] and "nothing: manifest.json can't be read (No such file" in messages[0]


def test_another_network_is_named_by_its_first_difference(pool: PoolOf, tmp_path: Path) -> None:
    folder = pool(2).run(save_after, Case(method="loco"), tmp_path, range(1))[0]
    messages = pool(2).run(load_error, Case(method="gim"), folder)
    assert messages[0] == messages[1]
    assert (
        "checkpoint of another network: heads.layer1.trunk.1.weight is missing there and (16, 16) here"
        in messages[0]
    )


def wider() -> nn.Module:
    net = training.Dyadic()
    net.weights[2] = nn.Parameter(torch.zeros(31, 8))
    return net


def load_into_wider(folder: Path) -> str:
    engine = training.build(DYADIC, wider())
    with pytest.raises(UserError) as caught:
        load_checkpoint(folder, engine)
    engine.close()
    return str(caught.value)


def test_another_shape_is_named_with_both(pool: PoolOf, tmp_path: Path) -> None:
    folder = pool(1).run(save_after, DYADIC, tmp_path, range(1))[0]
    assert "weights.2 is (31, 7) there and (31, 8) here" in pool(1).run(load_into_wider, folder)[0]


def test_another_optimizer_is_refused(pool: PoolOf, tmp_path: Path) -> None:
    folder = pool(1).run(save_after, DYADIC, tmp_path, range(1))[0]
    message = pool(1).run(load_error, replace(DYADIC, optimizer="sgd"), folder)[0]
    assert "its optimizer is LARS, and optim.name asks for SGD" in message


def test_the_newest_stay_and_saving_a_step_again_replaces_it(pool: PoolOf, tmp_path: Path) -> None:
    names = lambda: sorted(f.name for f in (tmp_path / "checkpoints").iterdir())  # noqa: E731
    pool(1).run(save_after, DYADIC, tmp_path, range(4), 3)
    assert names() == ["step-00000002", "step-00000003", "step-00000004"]
    # A run that fell back to step 2 and goes on: what lies ahead of it counts for nothing.
    (tmp_path / "checkpoints/step-00000004/model.safetensors").write_bytes(b"")
    pool(1).run(save_after, DYADIC, tmp_path, range(2, 3), 1)
    assert names() == ["step-00000003", "step-00000004"]
    pool(1).run(save_after, DYADIC, tmp_path, range(3, 4), 1)
    assert names() == ["step-00000004"]
    assert newest_checkpoint(tmp_path).name == "step-00000004"


def save_on_full_disk(run_dir: Path) -> tuple[str, list[str]]:
    """A file-size limit stands in for the disk: writes beyond it fail half-way, as they do on a full one."""
    engine = training.build(DYADIC)
    save_checkpoint(run_dir, engine, 1, STATE)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        save_checkpoint(run_dir, engine, 2, STATE)
        message = ""
    except UserError as error:
        message = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        engine.close()
    return message, sorted(os.listdir(run_dir / "checkpoints"))


def test_a_full_disk_is_one_line_and_leaves_the_previous_checkpoint(pool: PoolOf, tmp_path: Path) -> None:
    results = pool(2).run(save_on_full_disk, tmp_path)
    for message, left in results:
        assert "step-00000002: can't be written" in message and "earlier checkpoints are untouched" in message
        assert left == ["step-00000001"]
    assert results[0] == results[1]
    assert newest_checkpoint(tmp_path).name == "step-00000001"


def save_for_ever(run_dir: Path, connection: Any) -> None:
    """Save as fast as possible, reporting every step that is on the disk."""
    joining.start()
    net = training.Dyadic()
    net.weights.append(
        nn.Parameter(torch.zeros(500_000))
    )  # 4 MB a checkpoint: most of the time goes into writing
    engine = training.build(Case(engine="ddp"), net)
    found = newest_checkpoint(run_dir)
    step = int(found.name[5:]) if found else 0
    while True:
        step += 1
        save_checkpoint(run_dir, engine, step, STATE, Keep(1))
        connection.send(step)


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path, pool: PoolOf) -> None:
    rng = random.Random(0)
    for _ in range(4):
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(target=save_for_ever, args=(tmp_path, theirs), daemon=True)
        process.start()
        theirs.close()
        reported = ours.recv()
        process.join(rng.uniform(0, 0.2))
        process.kill()
        process.join()
        try:
            while ours.poll():
                reported = ours.recv()
        except EOFError:
            pass
        found = newest_checkpoint(tmp_path)
        assert found is not None and int(found.name[5:]) >= reported


def export(case: Case, path: Path) -> dict[str, torch.Tensor]:
    engine = training.build(case)
    training.advance(engine, case, range(1))
    export_backbone(engine, path)
    model = engine.model_state()
    engine.close()
    return model


@pytest.mark.parametrize("case", [Case(method="loco"), Case(method="mlaan", engine="fsdp")], ids=str)
def test_timm_loads_the_exported_backbone(pool: PoolOf, tmp_path: Path, case: Case) -> None:
    path = tmp_path / "run" / "backbone.safetensors"
    model = pool(2).run(export, case, path)[0]
    training.network(case)  # registers the networks that timm lacks
    net = timm.create_model("resnet8", num_classes=0, checkpoint_path=str(path))
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, model[f"backbone.{name}"]), name
    assert [file.name for file in path.parent.iterdir()] == ["backbone.safetensors"]


def test_an_export_that_fails_leaves_the_old_file(pool: PoolOf, tmp_path: Path) -> None:
    path = tmp_path / "backbone.safetensors"
    path.mkdir()
    with pytest.raises(RuntimeError, match=r"UserError: .*backbone.safetensors: can't be written"):
        pool(2).run(export, Case(method="bp"), path)
    assert list(tmp_path.iterdir()) == [path]
    shutil.rmtree(path)
