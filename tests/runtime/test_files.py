"""Whole files: what is there after a write, after one that failed, and with several writers."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from framework.runtime.errors import UserError, is_transient
from framework.runtime.files import new_file, sha256_of, write_whole


def test_a_file_and_its_folder_are_written(tmp_path: Path) -> None:
    write_whole(tmp_path / "a" / "b.txt", "naïve")
    write_whole(tmp_path / "a" / "b.txt", "again")
    assert (tmp_path / "a" / "b.txt").read_bytes() == b"again"
    assert os.listdir(tmp_path / "a") == ["b.txt"]
    (tmp_path / "plain").touch()
    assert (tmp_path / "a" / "b.txt").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_block_that_fails_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("earlier")
    with pytest.raises(KeyboardInterrupt), new_file(path) as file:
        file.write(b"half of")
        raise KeyboardInterrupt
    assert path.read_text() == "earlier"
    assert os.listdir(tmp_path) == ["file"]


def test_what_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/below: can't be written: "):
        write_whole(tmp_path / "file" / "below", b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"folder: can't be written: Is a directory"):
        write_whole(tmp_path / "folder", b"")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_writers_of_one_path_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = [bytes([number]) * 2**20 for number in range(8)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda content: write_whole(path, content), contents * 4))
    assert path.read_bytes() in contents
    assert os.listdir(tmp_path) == ["file"]


def test_sha256_of_bytes_and_files(tmp_path: Path) -> None:
    content = os.urandom(3 * 2**20 + 1)
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(content) == sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_full_disk_is_noticed_and_told_from_a_mistake(tmp_path: Path) -> None:
    """The first may be gone at the next start, which the exit status says. ``/dev/full`` stands in for the disk."""
    with pytest.raises(OSError, match="No space left on device") as full, new_file(tmp_path / "file") as file:
        os.dup2(os.open("/dev/full", os.O_WRONLY), file.fileno())
        file.write(b"x")
    with pytest.raises(OSError, match="No such file") as missing, new_file(tmp_path / "no folder" / "file"):
        pass
    assert is_transient(full.value) and not is_transient(missing.value)
    assert os.listdir(tmp_path) == []
