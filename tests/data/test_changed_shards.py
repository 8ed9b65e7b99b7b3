"""Shards that hold something else than their index says, in as many bytes."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from framework.data.packing.readers import read
from framework.data.packing.reading import Choices
from framework.data.packing.writer import write_shards
from framework.data.shards import unchanged
from framework.data.shards.index import ShardSet
from framework.data.shards.shard_contents import INDEX
from framework.runtime.errors import UserError
from tests.support.shards import samples, write_tar
from tests.support.waiting import until

FIRST, SECOND = "shard-000000.tar", "shard-000001.tar"
CHANGED = "has other contents than when it was indexed, in as many bytes"


def relabel(folder: Path) -> None:
    """Another label in the first shard, where the old one was."""
    data = (folder / FIRST).read_bytes()
    at = data.index(b"0000.cls") + 512
    (folder / FIRST).write_bytes(data[:at] + b"2" + data[at + 1 :])


def exchange(folder: Path) -> None:
    (folder / FIRST).rename(folder / "other")
    (folder / SECOND).rename(folder / FIRST)
    (folder / "other").rename(folder / SECOND)


def overwrite(folder: Path) -> None:
    with open(folder / SECOND, "r+b") as file:
        file.seek(1024)
        file.write(bytes(2048))


def packed(folder: Path, seen: bool) -> Path:
    """Two shards; ``seen`` says whether they were opened before."""
    write_shards(samples(8), folder, None, samples_per_shard=4)
    if seen:
        ShardSet.open(folder)
    _wait_for_the_clock_of_files(folder)
    return folder


def _wait_for_the_clock_of_files(folder: Path) -> None:
    """It is coarse."""
    probe = folder.with_name("probe")

    def later() -> bool:
        probe.write_bytes(b"")
        return probe.stat().st_mtime_ns > (folder / INDEX.head).stat().st_mtime_ns

    until(later)


def as_if_large(patch: pytest.MonkeyPatch) -> None:
    """No set is so small that it is always compared."""
    patch.setattr(unchanged, "_SMALL", 0)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("change", [relabel, exchange, overwrite])
def test_changed_shards_of_equal_size_are_named(tmp_path, monkeypatch, change, copied, seen, large):
    if large:
        as_if_large(monkeypatch)
    folder = packed(tmp_path / "a", seen)
    if copied:
        folder = shutil.copytree(folder, tmp_path / "b", copy_function=shutil.copy)
    change(folder)
    with pytest.raises(UserError, match=CHANGED):
        ShardSet.open(folder)
    with pytest.raises(UserError, match=CHANGED):  # make_shards.py
        read([str(folder)], Choices(), tmp_path, tmp_path, 10**9).open()
    (folder / INDEX.head).unlink()
    if change is not overwrite:
        assert len(ShardSet.open(folder)) == 8


@pytest.mark.parametrize("change", [relabel, exchange])
def test_shards_without_checksums_are_compared_with_the_index(tmp_path, change):
    folder = packed(tmp_path / "a", seen=False)
    (folder / INDEX.head).unlink()
    ShardSet.open(folder)
    assert not ShardSet.open(folder).contents.sha256
    _wait_for_the_clock_of_files(folder)
    change(folder)
    with pytest.raises(UserError, match=CHANGED):
        ShardSet.open(folder)


def test_small_sets_are_always_compared(tmp_path):
    """Whatever times say: here the copy of the index is younger than those of the shards."""
    folder = packed(tmp_path / "a", seen=True)
    relabel(folder)
    copy = shutil.copytree(folder, tmp_path / "b")
    os.utime(copy / INDEX.head, ns=(time.time_ns() + 10**9,) * 2)
    with pytest.raises(UserError, match=CHANGED):
        ShardSet.open(copy)


def test_headers_are_compared_even_where_no_time_tells(tmp_path, monkeypatch):
    as_if_large(monkeypatch)
    folder = packed(tmp_path / "a", seen=False)
    exchange(folder)
    os.utime(folder / INDEX.head, ns=(time.time_ns() + 10**9,) * 2)
    with pytest.raises(UserError, match=CHANGED):
        ShardSet.open(folder)


def _copied(folder: Path) -> Path:
    """Long after its index."""
    copy = shutil.copytree(folder, folder.with_name("copy"), copy_function=shutil.copy)
    os.utime(copy / INDEX.head, (1, 1))
    return copy


def _touched(folder: Path) -> Path:
    for path in folder.glob("*.tar"):
        os.utime(path)
    return folder


def _moved(folder: Path) -> Path:
    return folder.rename(folder.with_name("moved"))


@pytest.mark.parametrize("what", [_copied, _touched, _moved])
def test_whole_copies_are_compared_once(tmp_path, monkeypatch, what: Callable[[Path], Path]):
    folder = what(packed(tmp_path / "a", seen=False))
    whole = ShardSet.open(folder)
    assert np.array_equal(whole.labels, [i % 3 for i in range(8)])
    assert not [path for path in folder.iterdir() if path.name[0] == "."]
    as_if_large(monkeypatch)
    memory, compared = folder / ".index.seen.json", []
    for i in range(4):
        if i == 2:
            os.utime(folder / FIRST)
        ShardSet.open(folder)
        compared.append(memory.stat().st_ino if memory.exists() else None)
    untouched = what is _moved
    assert (compared[0] is None) == untouched
    assert compared[0] == compared[1] != compared[2] == compared[3]


def test_nothing_is_remembered_where_only_reading_is_allowed(tmp_path):
    write_tar(tmp_path / "a.tar", [("0.png", b"1")])
    ShardSet.open(tmp_path)
    ShardSet.open(tmp_path, save_index=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "index.json", "index.npz"]
