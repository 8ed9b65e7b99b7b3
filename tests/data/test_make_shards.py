"""Packing: every kind of source, the same bytes each time, going on after a kill, images that are none."""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import signal
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from framework.data.loading.decode import decode
from framework.data.packing.images import FileImages
from framework.data.packing.packer import Packing, encoded, pack, pack_splits
from framework.data.shards.index import ShardSet
from framework.runtime.errors import UserError
from framework.runtime.exit_status import EXIT_USAGE
from tests.support.commands import run_tool
from tests.support.packing import contents, opened, packed
from tests.support.toy_images import image, photographs, tree


def test_splits_and_classes_are_folders(tmp_path):
    files = photographs() | {
        "train/cat/notes.txt": b"",
        "train/cat/._0.png": b"",
        "train/dog/x.y.JPEG": image(9),
    }
    found = packed(tree(tmp_path / "src", files), tmp_path / "out")
    assert {split: len(shards) for split, shards in found.items()} == {"train": 13, "val": 12}
    assert found["val"].classes == ["cat", "dog"]
    stored = sorted((int(found["val"].labels[i]), found["val"].read(i)) for i in range(12))
    assert stored == sorted((label, image(number)) for label in range(2) for number in range(6))
    first_shard = found["val"].labels[found["val"].table.shard == 0]
    assert set(first_shard.tolist()) == {0, 1}  # classes are spread
    assert sorted(contents(tmp_path / "out" / "val")) == [
        "classes.json",
        "index.json",
        "index.npz",
        *(f"shard-{number:06d}.tar" for number in range(3)),
    ]


def test_folders_without_splits_or_classes(tmp_path):
    classes = packed(tree(tmp_path / "a", photographs(("",))), tmp_path / "out_a")[""]
    assert (len(classes), classes.classes) == (12, ["cat", "dog"])
    flat = packed(tree(tmp_path / "b", {"0.png": image(0), "1.png": image(1)}), tmp_path / "out_b")[""]
    assert (len(flat), flat.labeled, flat.classes) == (2, False, None)


def test_folders_named_like_splits_are_no_classes(tmp_path):
    files = {"train/0.png": image(0), "train/1.png": image(1), "test/0.png": image(2)}
    found = packed(tree(tmp_path / "a", files), tmp_path / "out_a")
    assert {split: len(shards) for split, shards in found.items()} == {"train": 2, "test": 1}
    assert not any(shards.labeled or shards.classes for shards in found.values())
    vehicles = {"bus/0.png": image(0), "train/0.png": image(1)}
    assert packed(tree(tmp_path / "b", vehicles), tmp_path / "out_b")[""].classes == ["bus", "train"]


@pytest.mark.parametrize("zipped", [False, True])
def test_archives_give_the_bytes_of_the_folder(tmp_path, zipped):
    source = tree(tmp_path / "src", photographs())
    archive = tmp_path / "images.tar"
    with tarfile.open(archive, "w:gz" if zipped else "w") as tar:
        tar.add(source, ".")
    packed(source, tmp_path / "out")
    packed(archive, tmp_path / "other", workers=2)
    assert contents(tmp_path / "out" / "train") == contents(tmp_path / "other" / "train")


def test_webdataset_decodes_what_was_packed(tmp_path):
    packed(tree(tmp_path / "src", photographs(("",))), tmp_path / "out")
    shards = ShardSet.open(tmp_path / "out")
    urls = [str(tmp_path / "out" / name) for name in shards.shards]
    found = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert len(found) == 12
    for i, sample in enumerate(found):
        assert sample["cls"] == shards.labels[i]
        assert np.array_equal(sample["png"].transpose(2, 0, 1), decode(shards.read(i)).numpy())


def test_shards_are_packed_anew(tmp_path):
    packed(tree(tmp_path / "src", photographs()), tmp_path / "out")
    small = packed(tmp_path / "out", tmp_path / "small", shorter_side=4, encode="jpg", samples_per_shard=100)
    for split in ("train", "val"):
        assert list(small[split].shards) == ["shard-000000.tar"]
        assert small[split].classes == ["cat", "dog"]
        assert sorted(small[split].labels) == [0] * 6 + [1] * 6
        assert decode(small[split].read(0)).shape == (3, 4, 6)
        assert small[split].read(0).startswith(b"\xff\xd8")
    one = packed(tmp_path / "out" / "train", tmp_path / "one")[""]
    assert len(one) == 12


def test_any_number_of_workers_gives_equal_bytes(tmp_path):
    source = tree(tmp_path / "src", photographs(("",)))
    packed(source, tmp_path / "a")
    packed(source, tmp_path / "b", workers=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def in_child(body: Callable[[], None]) -> int:
    """Exit status of a fork that runs ``body``, or minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_killed_run_goes_on_with_what_is_whole(tmp_path):
    source = tree(tmp_path / "src", photographs(("",)))
    packed(source, tmp_path / "whole")

    def killed() -> None:
        shards = pack(opened(source, tmp_path)[""], tmp_path / "out", Packing(5), 0)
        next(shards), next(shards)
        for name in (".shard-000002.tar", ".shard-000002.tar.done.0f"):
            (tmp_path / ".out.partial" / name).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(killed) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    first = (tmp_path / ".out.partial" / "shard-000000.tar").stat().st_mtime_ns
    packed(source, tmp_path / "out")
    assert (tmp_path / "out" / "shard-000000.tar").stat().st_mtime_ns == first
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / ".out.partial").exists()


def test_a_folder_that_an_older_version_left_goes_on(tmp_path):
    """What to pack, and how, stood in ``plan.json``."""
    source = tree(tmp_path / "src", photographs(("",)))
    half = pack(opened(source, tmp_path)[""], tmp_path / "out", Packing(5), 0)
    next(half)
    half.close()
    partial = tmp_path / ".out.partial"
    settings = json.loads((partial / "packing.json").read_text())
    assert list(settings) == ["source", "samples", "samples_per_shard", "shorter_side", "encode", "quality"]
    (partial / "packing.json").rename(partial / "plan.json")
    first = (partial / "shard-000000.tar").stat().st_mtime_ns
    packed(source, tmp_path / "out")
    assert (tmp_path / "out" / "shard-000000.tar").stat().st_mtime_ns == first
    assert not {"plan.json", "packing.json"} & set(contents(tmp_path / "out"))


def test_another_plan_starts_afresh(tmp_path):
    source = tree(tmp_path / "src", photographs(("",)))
    half = pack(opened(source, tmp_path)[""], tmp_path / "out", Packing(5), 0)
    next(half)
    half.close()
    found = packed(source, tmp_path / "out", encode="webp")[""]
    assert all(found.read(i)[8:12] == b"WEBP" for i in range(12))
    with pytest.raises(UserError, match="is not empty"):
        packed(source, tmp_path / "out")


def test_images_that_are_none_are_left_out_by_name(tmp_path):
    deep = io.BytesIO()
    Image.fromarray(np.full((4, 4), 30000, np.uint16)).save(deep, "png")
    files = {
        "a/empty.jpg": b"",
        "a/deep.jpg": deep.getvalue(),
        "a/text.jpg": b"text",
        "a/cut.jpg": image(0, (64, 64), "jpeg")[:700],
        "a/cmyk.jpg": image(1, form="jpeg", mode="CMYK"),
        "a/gif.jpg": image(2, form="gif", mode="P"),
        "a/good.jpg": image(3, form="jpeg"),
    }
    found = packed(tree(tmp_path / "src", files), tmp_path / "out")[""]
    lines = (tmp_path / "out" / "left_out.txt").read_text().splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == [
        "a/cut.jpg",
        "a/deep.jpg",
        "a/empty.jpg",
        "a/text.jpg",
    ]
    assert "a/empty.jpg: empty" in lines
    stored = {found.read(i) for i in range(3)}
    assert {files["a/cmyk.jpg"], files["a/good.jpg"]} < stored
    assert any(data.startswith(b"\x89PNG") for data in stored)
    with pytest.raises(UserError, match="none of the 2 images is whole"):
        packed(tree(tmp_path / "bad", {"a/0.jpg": b"", "a/1.jpg": b"x"}), tmp_path / "none")


def test_shrinking_keeps_small_images_and_the_aspect(tmp_path):
    large, small = image(0, (300, 100), "jpeg"), image(1, (30, 60), "jpeg")
    packing = Packing(shorter_side=50)
    assert encoded(small, packing) == (small, "jpg")
    data, extension = encoded(large, packing)
    assert (decode(data).shape, extension) == ((3, 50, 150), "jpg")
    assert encoded(image(2, form="bmp"), Packing())[1] == "png"
    camera = io.BytesIO()
    first, second = (Image.open(io.BytesIO(data)) for data in (large, small))
    first.save(camera, "MPO", save_all=True, append_images=[second])
    assert Image.open(camera).format == "MPO"
    assert encoded(camera.getvalue(), Packing()) == (camera.getvalue(), "jpg")
    shrunk, extension = encoded(camera.getvalue(), packing)
    assert (decode(shrunk).shape, extension) == ((3, 50, 150), "jpg")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    assert np.array_equal(decode(encoded(pixels, Packing())[0]).permute(1, 2, 0), pixels)


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({}, "holds no images"),
        ({"readme.txt": b""}, "holds no images"),
        ({"a/0.png": b"", "a/1.png": b"", "0.png": b""}, "src: .* all alike; 0.png does not"),
        ({"train/a/0.png": b"", "train/a/1.png": b"", "test/0.png": b""}, "all alike; test/0.png does not"),
        ({"a/b/c/0.png": b""}, "all alike; a/b/c/0.png does not"),
    ],
)
def test_unusable_folders_are_named(tmp_path, files, problem):
    (tmp_path / "src").mkdir()
    with pytest.raises(UserError, match=problem):
        packed(tree(tmp_path / "src", files), tmp_path / "out")


def test_unusable_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        packed(tmp_path / "none", tmp_path / "out")
    source = tree(tmp_path / "src", photographs(("",)))
    packed(source, tmp_path / "out")
    with pytest.raises(UserError, match="is a shard; name the folder"):
        packed(tmp_path / "out" / "shard-000000.tar", tmp_path / "other")


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("archive")
    with tarfile.open(folder / "a.tar", "w") as tar:
        tar.add(tree(folder / "src", photographs(("",))), ".")
    return (folder / "a.tar").read_bytes()


@settings(max_examples=60, deadline=None)
@given(
    cut=st.none() | st.integers(0, 12000),
    flips=st.lists(st.tuples(st.integers(0, 12000), st.integers(0, 255)), max_size=3),
    zipped=st.booleans(),
)
def test_damaged_archives_give_user_errors_only(archive, cut, flips, zipped):
    damaged = bytearray(gzip.compress(archive, 1) if zipped else archive)
    for position, value in flips:
        damaged[position % len(damaged)] = value
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.tar").write_bytes(damaged[:cut])
        try:
            found = packed(Path(folder) / "a.tar", Path(folder) / "out")
        except UserError:
            return
        assert sum(len(shards) for shards in found.values()) <= 12
        assert all(
            decode(shards.read(i)).shape[0] == 3 for shards in found.values() for i in range(len(shards))
        )


def test_a_full_disk_is_named_and_nothing_is_taken_for_whole(tmp_path):
    source = tree(tmp_path / "src", photographs(("",)))

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # no file may be longer
        with pytest.raises(UserError, match="File too large"):
            packed(source, tmp_path / "out")

    assert in_child(limited) == 0
    assert not (tmp_path / "out").exists()
    assert len(packed(source, tmp_path / "out")[""]) == 12


def test_missing_permission_is_named(tmp_path):
    source = tree(tmp_path / "src", photographs(("",)))
    packed(source, tmp_path / "out")
    for path in (source / "cat", tmp_path / "out" / "shard-000000.tar"):
        path.chmod(0)
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(folder.stat().st_mode | 0o555)

    def as_somebody() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setegid(65534)
            os.seteuid(65534)
        with pytest.raises(UserError, match="cat: cannot be read: Permission denied"):
            opened(source, tmp_path)
        with pytest.raises(UserError, match=r"shard-000000\.tar: cannot be read: Permission denied"):
            shards = ShardSet.open(tmp_path / "out")
            [shards.read(i) for i in range(12)]

    assert in_child(as_somebody) == 0


def test_command_line(tmp_path, capsys):
    tree(tmp_path / "src", {**photographs(), "train/cat/bad.jpg": b"x"})
    command = ("make_shards", tmp_path / "src", tmp_path / "out", "--workers", 2)
    assert run_tool(*command) == 0
    printed = capsys.readouterr()
    assert f"{tmp_path / 'out' / 'train'}: 12 images, 1 left out" in printed.out
    assert "left out: train/cat/bad.jpg: no known image format" in printed.err
    assert run_tool(*command) == EXIT_USAGE
    assert "is not empty; remove it or name another folder" in capsys.readouterr().err


def test_a_destination_that_cannot_be_is_one_line(tmp_path, capsys):
    source = tree(tmp_path / "src", {f"{i}.png": image(i) for i in range(3)})
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "to").symlink_to("full")
    before = sorted(tmp_path.rglob("*"))
    for dest, problem in {
        "o" * 300: "cannot be written: File name too long",
        "o" * 250: "cannot be written: File name too long",  # with what is added while it is written
        "a/" + "o" * 300: "cannot be written: File name too long",
        "a\0b": "cannot be written: ",
        "file": "is in the way, a file or a link that leads nowhere",
        "file/below": "cannot be written: Not a directory",
        "link": "is in the way, a file or a link that leads nowhere",
        "to": "is a link; name the folder",
    }.items():
        assert run_tool("make_shards", source, tmp_path / dest, "--workers", 0) == EXIT_USAGE, dest
        assert problem in (shown := capsys.readouterr().err) and shown.count("error: ") == 1, dest
    for name in ("o" * 300, "a\0b"):
        assert run_tool("make_shards", tmp_path / name, tmp_path / "out") == EXIT_USAGE
        assert "no such file or folder" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("split", ["a/b", "..", "a\0b", "o" * 300])
def test_a_split_whose_name_is_no_folder_is_one_line(tmp_path, split):
    images = {split: FileImages(["0"], None, None, lambda i: image(i), "")}
    with pytest.raises(UserError, match=r"is no name of a folder|cannot be written"):
        list(pack_splits(images, tmp_path / "out", Packing(), 0))
    assert list(tmp_path.iterdir()) == []
