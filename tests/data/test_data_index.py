"""Shards, their index, and every way in which they can be wrong."""

from __future__ import annotations

import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from framework.data.loading.decode import decode
from framework.data.packing.digits import prepare_digits
from framework.data.packing.writer import write_shards
from framework.data.shards.index import ShardSet
from framework.runtime.errors import UserError
from tests.support.shards import png, samples, write_tar


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        ShardSet.open(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_written_shards_read_back(tmp_path):
    write_shards(samples(7), tmp_path / "a", ["x", "y", "z"], samples_per_shard=3)
    shards = ShardSet.open(tmp_path / "a")
    assert [shards.read(i) for i in range(len(shards))] == [png(i) for i in range(7)]
    assert shards.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert shards.labeled
    assert shards.classes == ["x", "y", "z"]
    name, offset = shards.where(4).split(" @ ")
    assert name == "shard-000001.tar"
    assert (tmp_path / "a" / name).read_bytes()[int(offset) :].startswith(png(4))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_equal_samples_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        write_shards(samples(5), tmp_path / name, None, samples_per_shard=2)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["index.json", "index.npz", *(f"shard-{i:06d}.tar" for i in range(3))]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_webdataset_reads_our_shards(tmp_path):
    write_shards(samples(5), tmp_path / "a", None, samples_per_shard=2)
    urls = [str(path) for path in sorted((tmp_path / "a").glob("*.tar"))]
    found = [(s["__key__"], s["png"], s["cls"]) for s in webdataset.WebDataset(urls, shardshuffle=False)]
    assert found == [(key, image, str(label).encode()) for key, image, _, label in samples(5)]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_foreign_shards(tmp_path, form):
    long = "deep.er/" * 20 + "ü"
    write_tar(tmp_path / "split" / "b.tar", [("k.webp", b"last"), ("k.CLS", b"1")], form)
    members = [
        ("README.txt", b"passed over"),
        ("./0.cls", b" 1\n"),
        ("./0.JPEG", b"first"),
        ("./0.json", b"{}"),
        ("1.ppm", b"second"),
        ("1.seg.png", b"a mask"),
        ("1.cls", b"0"),
        ("._1.jpg", b"a Mac was here"),
    ]
    if form != tarfile.USTAR_FORMAT:
        members += [(f"{long}.jpg", b"long name"), (f"{long}.cls", b"0")]
    write_tar(tmp_path / "split" / "a.tar", members, form)
    (tmp_path / "classes.json").write_text('["no", "yes"]')
    for _ in range(2):  # the second time from the index
        shards = ShardSet.open(tmp_path / "split")
        images = [shards.read(i) for i in range(len(shards))]
        assert images[:2] + images[-1:] == [b"first", b"second", b"last"]
        assert len(images) == (3 if form == tarfile.USTAR_FORMAT else 4)
        assert shards.labels[[0, 1, -1]].tolist() == [1, 0, 1]
        assert shards.classes == ["no", "yes"]
    assert (tmp_path / "split" / "index.json").exists()


def test_shards_without_labels(tmp_path):
    write_tar(tmp_path / "a.tar", [("0.png", png(0))])
    shards = ShardSet.open(tmp_path)
    assert not shards.labeled
    assert shards.classes is None


def test_unwritable_index_stays_in_memory(tmp_path, caplog):
    write_tar(tmp_path / "a.tar", [("0.png", png(0))])
    (tmp_path / "index.npz" / "in the way").mkdir(parents=True)
    shards = ShardSet.open(tmp_path)
    assert shards.read(0) == png(0)
    assert "can't be written" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "index.npz"]


def test_descriptors_are_bounded_and_closed(tmp_path):
    write_shards(samples(300), tmp_path / "a", None, samples_per_shard=1)

    def open_shards() -> int:
        return sum(
            os.path.realpath(f"/proc/self/fd/{fd}").endswith(".tar") for fd in os.listdir("/proc/self/fd")
        )

    shards = ShardSet.open(tmp_path / "a")
    for i in range(300):
        assert shards.read(i) == png(i % 256)
    assert 0 < open_shards() <= 256
    copy = pickle.loads(pickle.dumps(shards))
    shards.close()
    assert open_shards() == 0
    assert copy.read(7) == shards.read(7)
    del copy, shards
    assert open_shards() == 0


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ([("0.png", b""), ("1.png", b""), ("0.cls", b"1")], "'0' comes twice"),
        ([("0.png", b"1"), ("0.PNG", b"2")], "'0.PNG' comes twice"),
        ([("0.png", b"1"), ("0.jpg", b"2")], "'0' has 2 images (png, jpg)"),
        ([("0.tiff", b"1"), ("0.cls", b"2")], "'0' has no image"),
        ([("0.txt", b"1")], "holds no image"),
        ([], "holds no image"),
        ([("0.png", b"1"), ("0.cls", b"cat")], "label of key '0' is b'cat'"),
        ([("0.png", b"1"), ("0.cls", b"-1")], "label of key '0' is b'-1'"),
        ([("0.png", b"1"), ("0.cls", b"2")], "label 2 is outside the 2 classes"),
        ([("0.png", b"1"), ("0.cls", b"1"), ("1.png", b"2")], "samples without label"),
    ],
)
def test_unusable_members_are_named(tmp_path, members, problem):
    write_tar(tmp_path / "bad.tar", members)
    (tmp_path / "classes.json").write_text('["a", "b"]')
    message = refused(tmp_path)
    assert problem in message
    assert "bad.tar" in message
    assert not (tmp_path / "index.json").exists()


def test_links_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("0.png")
        link.type, link.linkname = tarfile.LNKTYPE, "elsewhere.png"
        tar.addfile(link)
    assert "'0.png' is a link" in refused(tmp_path)


def test_unusable_folders_are_named(tmp_path):
    assert "no such folder" in refused(tmp_path / "none")
    assert "holds no shards" in refused(tmp_path)
    (tmp_path / "a.tar").symlink_to(tmp_path / "gone.tar")
    assert "a.tar: cannot be read" in refused(tmp_path)
    (tmp_path / "a.tar").unlink()
    (tmp_path / "a.tar").mkdir()
    assert "a.tar: cannot be read" in refused(tmp_path)


def test_what_is_no_whole_tar_is_named(tmp_path):
    whole = write_tar(
        tmp_path / "a.tar", [("0.png", png(0)), ("0.cls", b"1"), ("1.png", png(1))]
    ).read_bytes()
    for data in (b"", b"plain text", os.urandom(2048), b"\x1f\x8b" + whole):
        (tmp_path / "a.tar").write_bytes(data)
        assert "a.tar: " in refused(tmp_path)
    for length in (600, 1024, 1536, 2048, 2560):  # inside and between members, and without the end
        (tmp_path / "a.tar").write_bytes(whole[:length])
        assert "a.tar: " in refused(tmp_path)
    (tmp_path / "a.tar").write_bytes(whole + whole)
    assert "single archive" in refused(tmp_path)


def test_a_copied_shard_is_found(tmp_path):
    data = write_tar(tmp_path / "a.tar", [("0.png", png(0))]).read_bytes()
    (tmp_path / "b.tar").write_bytes(data)
    assert "b.tar: is a copy of a.tar" in refused(tmp_path)
    write_tar(tmp_path / "b.tar", [("0.png", png(9))])  # keys may start anew in every shard
    assert len(ShardSet.open(tmp_path)) == 2


def test_changes_after_indexing_are_named(tmp_path):
    write_shards(samples(4), tmp_path / "a", ["x", "y", "z"], samples_per_shard=2)
    first = tmp_path / "a" / "shard-000000.tar"
    data = first.read_bytes()
    first.write_bytes(data[:-512])
    assert f"has {len(data) - 512} bytes and had {len(data)}" in refused(tmp_path / "a")
    first.unlink()
    assert "shard-000000.tar: missing" in refused(tmp_path / "a")
    first.write_bytes(data)
    write_tar(tmp_path / "a" / "new.tar", [("0.png", b"1")])
    assert "new.tar: not in the index" in refused(tmp_path / "a")
    (tmp_path / "a" / "new.tar").unlink()
    (tmp_path / "a" / "classes.json").write_text('["x", "z", "y"]')
    assert "classes.json is not the one" in refused(tmp_path / "a")
    (tmp_path / "a" / "index.json").unlink()
    assert ShardSet.open(tmp_path / "a").classes == ["x", "z", "y"]


def test_shards_that_change_in_use_are_named(tmp_path):
    write_shards(samples(4), tmp_path / "a", None, samples_per_shard=2)
    shards = ShardSet.open(tmp_path / "a")
    os.truncate(tmp_path / "a" / "shard-000000.tar", 600)
    with pytest.raises(UserError, match=r"shard-000000\.tar: became shorter"):
        shards.read(1)
    (tmp_path / "a" / "shard-000001.tar").unlink()
    with pytest.raises(UserError, match=r"shard-000001\.tar: cannot be read"):
        shards.read(2)


@pytest.mark.parametrize("text", ["{", '{"a": 1}', "[]", "[1, 2]"])
def test_bad_class_names_are_named(tmp_path, text):
    write_tar(tmp_path / "a.tar", [("0.png", b"1")])
    (tmp_path / "classes.json").write_text(text)
    assert "classes.json: must be a JSON list of class names" in refused(tmp_path)


@pytest.mark.parametrize(
    ("sample", "problem"),
    [
        (("a.b", b"", "png", 0), "'a.b': must have no dot"),
        (("", b"", "png", 0), "must have no dot"),
        (("a", b"", "gif", 0), "'gif' must be one of"),
        (("a", b"", "png", 5), "label 5 is outside the 2 classes"),
    ],
)
def test_unusable_samples_leave_nothing_behind(tmp_path, sample, problem):
    with pytest.raises(UserError, match=problem):
        write_shards([("first", png(0), "png", 1), sample], tmp_path / "a", ["x", "y"])
    assert list(tmp_path.iterdir()) == []


def test_existing_folders_are_kept(tmp_path):
    (tmp_path / "a").mkdir()
    write_shards(samples(1), tmp_path / "a", None)
    with pytest.raises(UserError, match="is not empty"):
        write_shards(samples(2), tmp_path / "a", None)
    assert len(ShardSet.open(tmp_path / "a")) == 1
    with pytest.raises(UserError, match="holds no shards"):
        write_shards([], tmp_path / "b", None)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("folder", [".", "/"])
def test_a_folder_without_a_name_is_refused(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"{folder}: cannot be replaced; name a folder"):
        write_shards(samples(1), Path(folder), None)
    assert list(tmp_path.iterdir()) == []


def test_digits(tmp_path):
    prepare_digits(tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
    prepare_digits(tmp_path)
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
    train, test = ShardSet.open(tmp_path / "train"), ShardSet.open(tmp_path / "test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.classes == test.classes == [str(digit) for digit in range(10)]
    assert np.bincount(test.labels).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    images = np.stack([decode(train.read(i)).numpy() for i in range(50)])
    assert images.shape == (50, 3, 8, 8)
    assert (images.min(), images.max()) == (0, 255)
    write_shards(samples(3), tmp_path / "other" / "train", None)
    with pytest.raises(
        UserError, match=r"holds 3 samples, not the 1437 digits.*data.prepare=none to train on your own"
    ):
        prepare_digits(tmp_path / "other")


def test_a_large_index_opens_without_pickle(tmp_path):
    write_shards(samples(2), tmp_path / "a", None)
    head = json.loads((tmp_path / "a" / "index.json").read_text())
    assert head["shards"] == {"shard-000000.tar": (tmp_path / "a" / "shard-000000.tar").stat().st_size}
    with np.load(tmp_path / "a" / "index.npz", allow_pickle=False) as arrays:
        assert {name: arrays[name].tolist() for name in ("shard", "label")} == {
            "shard": [0, 0],
            "label": [0, 1],
        }
