"""Nothing is dropped in silence: every file is packed, or counted by kind; a class that would be missing is refused."""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from framework.data.packing.packer import Packing, pack_splits
from framework.data.packing.readers import read
from framework.data.packing.reading import Choices, Reading
from framework.data.shards.image_types import FORMATS, SUFFIXES, begins_like_an_image, suffix
from framework.data.shards.index import ShardSet
from framework.data.shards.scan import scan_shard
from framework.runtime.errors import UserError
from framework.runtime.exit_status import EXIT_USAGE
from tests.support.commands import run_tool
from tests.support.toy_images import image, photographs, shard, tar, tree


def reading(source: Path, **choices: object) -> Reading:
    work = source.parent
    return read([str(source)], Choices(**choices), work, work / "cache", 10**9)


def names(found: Reading) -> set[str]:
    return {images[i].where for images in found.open().values() for i in range(len(images))}


def test_suffixes_are_those_that_pillow_knows() -> None:
    Image.init()
    registered = {
        end: form for end, form in Image.registered_extensions().items() if form in {*FORMATS, "MPO"}
    }
    assert SUFFIXES - {".avif", ".avifs"} <= registered.keys() <= SUFFIXES
    assert all(form in FORMATS.keys() | {"MPO"} for form in registered.values())


@pytest.mark.parametrize(
    ("name", "form"),
    [("a.jfif", "jpeg"), ("a.jpe", "jpeg"), ("a.JPG", "jpeg"), ("a.avif", "avif"), ("a", "png"), ("a.0001", "jpeg"),
     ("a b.v2.webp", "webp"), ("a.bmp", "bmp"), ("a.gif", "gif"), ("a.TIF", "tiff"), ("a.pgm", "ppm"),
     ("a.jp2", "jpeg2000")],
)  # fmt: skip
def test_every_suffix_of_an_image_and_none_is_packed(tmp_path, name, form):
    if form == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    source = tree(
        tmp_path / "src", {f"train/cat/{name}": image(1, (64, 48), form), "train/dog/b.png": image(2)}
    )
    found = reading(source)
    assert names(found) == {f"train/cat/{name}", "train/dog/b.png"} and not found.unpacked
    list(pack_splits(found.open(), tmp_path / "out", Packing(), 0))
    assert len(ShardSet.open(tmp_path / "out" / "train")) == 2


def test_bytes_decide_where_there_is_no_suffix():
    for form in ("jpeg", "png", "webp", "gif", "bmp", "tiff", "ppm"):
        assert begins_like_an_image(image(0, (30, 20), form)), form
    for data in (
        b"",
        b"text",
        b"PK\x03\x04",
        b"\x1f\x8b\x08",
        b"\0" * 600,
        b"P5 no numbers",
        os.urandom(600),
    ):
        assert not begins_like_an_image(data)
    assert [suffix(name) for name in ("a.JPG", "b.0001", "c", "d.tar.gz", ".e")] == [
        ".jpg",
        "",
        "",
        ".gz",
        "",
    ]


def test_other_files_are_counted_by_kind(tmp_path):
    others = {"train/cat/a.heic": b"x", "train/cat/b.HEIC": b"x", "train/c.txt": b"", "README": b"text", "d.npy": b"",
              "train/cat/.d.png": image(0), "train/cat/Thumbs.db": b"", ".git/a": b"", ".git/b": b""}  # fmt: skip
    source = tree(tmp_path / "src", photographs() | others)
    os.symlink("nowhere.png", source / "train" / "cat" / "link.png")
    os.symlink("0.png", source / "train" / "cat" / "good.png")
    os.symlink("..", source / "train" / "loop")
    os.mkfifo(source / "train" / "cat" / "pipe.png")
    found = reading(source)
    assert names(found) == {*photographs(), "train/cat/good.png"}
    assert found.unpacked == {
        ".heic": 2, ".txt": 1, "without suffix": 1, ".npy": 1, ".db": 1, "hidden": 1, "hidden folder": 1,
        "broken link": 1, "link to a folder around it": 1, "not a file": 1,
    }  # fmt: skip
    assert reading(source, skip=["*.heic", "README"]).unpacked["skipped as asked"] == 2


def test_links_within_an_archive_are_followed(tmp_path):
    """Links to a file, to a link, to a folder, hard ones, from another folder, into a circle, to nowhere."""
    members = {"real/1.png": image(1), "real/2.png": image(2), "cat/0.png": image(0), "dog/0.png": image(3)}
    links = {"cat/1.png": "../real/1.png", "cat/2.png": "1.png", "dog/1.png": "../cat/./2.png", "bird": "real",
             "cat/8.png": "9.png", "cat/9.png": "8.png", "cat/7.png": "../../elsewhere.png"}  # fmt: skip
    path = tmp_path / "a.tar"
    path.write_bytes(tar(members, links))
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("dog/2.png")
        link.type, link.linkname = tarfile.LNKTYPE, "real/2.png"
        archive.addfile(link)
    found = reading(path)
    images = found.open()[""]
    assert {images[i].where: images[i].image for i in range(len(images))} == {
        **members, "cat/1.png": image(1), "cat/2.png": image(1), "dog/1.png": image(1), "dog/2.png": image(2),
        "bird/1.png": image(1), "bird/2.png": image(2),
    }  # fmt: skip
    assert images.classes == ["bird", "cat", "dog", "real"]
    assert found.unpacked == {"link that leads nowhere": 3}


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (
            {"train/bird/0.heic": b"x"},
            r"the class train/bird would be missing: .* \(1 .heic\).*--skip 'train/bird'",
        ),
        ({"val/dog/0.txt": b"x", "val/cat/0.png": image(0)}, "the class val/dog would be missing"),
        ({"test/cat/0.heic": b"x"}, "the split test would be missing"),
    ],
)
def test_a_class_or_split_that_would_be_missing_is_an_error(tmp_path, files, problem):
    source = tree(tmp_path / "src", photographs(("train/",)) | files)
    with pytest.raises(UserError, match=problem) as error:
        reading(source)
    skip = str(error.value).partition("--skip '")[2].partition("'")[0]
    assert names(reading(source, skip=[skip])) == {name for name in {*photographs(("train/",)), *files}
                                                   if not name.startswith(skip)}  # fmt: skip


ARCHIVES_AND_LINKS = [
    ("val.zip", "split val"), ("set-val.tar.gz", "split val"), ("train/fox.tar.gz", "class train/fox"),
    ("val", "split val"), ("train/fox", "class train/fox"), ("test.7z", "split test"),
    ("train/fox.zip", "class train/fox"),
]  # fmt: skip


@pytest.mark.parametrize("archived", [False, True])
@pytest.mark.parametrize(("name", "missing"), ARCHIVES_AND_LINKS)
def test_an_archive_or_a_broken_link_in_place_of_a_class_or_split(tmp_path, name, missing, archived):
    source = tree(tmp_path / "src", photographs(("train/",)))
    if "." in name:
        (source / name).write_bytes(b"x")
        what = f"{name} is an archive; unpack it"
    else:
        (source / name).symlink_to("/nowhere")
        what = f"{name} is a link that leads nowhere; mend it"
    if archived:
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            archive.add(source, ".")
        source = tmp_path / "a.tar"
    with pytest.raises(UserError, match=f"the {missing} would be missing: {what}.*--skip '{name}'"):
        reading(source)
    assert names(reading(source, skip=[name])) == {*photographs(("train/",))}


@pytest.mark.parametrize("name", ["fox.tgz", "fox"])
def test_a_class_alone_in_place_of_a_folder(tmp_path, name):
    source = tree(tmp_path / "src", photographs(("",)))
    (source / name).symlink_to("/nowhere") if "." not in name else (source / name).write_bytes(b"x")
    with pytest.raises(UserError, match="the class fox would be missing"):
        reading(source)


def test_archives_whose_folders_are_there_and_downloads_are_counted(tmp_path):
    """What was unpacked lies beside its archive."""
    archives = dict.fromkeys(("train.zip", "VAL.tar.gz", "train/cat.zip", "photographs.zip"), b"x")
    source = tree(tmp_path / "src", photographs() | archives)
    assert reading(source).unpacked == {".zip": 3, ".gz": 1}
    around = {f"photos/{name}": data for name, data in photographs(("train/",)).items()}
    with pytest.raises(UserError, match="the split val would be missing"):
        reading(tree(tmp_path / "around", around | {"val.zip": b"x"}))
    assert reading(tree(tmp_path / "other", around | {"b.zip": b"x"})).unpacked == {".zip": 1}
    flat = tree(tmp_path / "cats", photographs(("",)) | {"cats.zip": b"x", "dog.zip": b"x"})
    assert reading(flat).unpacked == {".zip": 2}


def test_a_split_of_shards_that_is_an_archive_or_a_broken_link(tmp_path):
    source = tree(tmp_path / "src", {"train/a-0.tar": shard(0), "val.zip": b"x"})
    with pytest.raises(UserError, match=r"the split val would be missing: val\.zip is an archive"):
        reading(source)
    (source / "val.zip").unlink()
    (source / "val").symlink_to("/nowhere")
    with pytest.raises(UserError, match="the split val would be missing: val is a link that leads nowhere"):
        reading(source)
    assert set(reading(source, skip=["val"]).open()) == {"train"}


def test_an_empty_folder_is_a_missing_class_unless_another_split_has_it(tmp_path):
    source = tree(tmp_path / "src", photographs(("train/",)) | {"val/cat/0.png": image(0)})
    (source / "val" / "dog").mkdir()
    assert reading(source).open()["val"].classes == ["cat", "dog"]
    (source / "train" / "bird").mkdir()
    with pytest.raises(UserError, match="the class train/bird would be missing: it is empty"):
        reading(source)
    (tmp_path / "flat" / "cat").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds no images .* but nothing"):
        reading(tmp_path / "flat")


def test_a_class_whose_images_are_all_broken_is_an_error_that_can_be_mended(tmp_path):
    files = photographs(("train/",)) | {f"train/bird/{i}.png": b"broken" for i in range(3)}
    source = tree(tmp_path / "src", files)
    with pytest.raises(
        UserError, match="train: none of the 3 images of class bird is whole, so it would be missing"
    ):
        list(pack_splits(reading(source).open(), tmp_path / "out", Packing(4), 0))
    assert not (tmp_path / "out" / "train").exists()
    (source / "train" / "bird" / "1.png").write_bytes(image(9))
    list(pack_splits(reading(source).open(), tmp_path / "out", Packing(4), 0))
    shards = ShardSet.open(tmp_path / "out" / "train")
    assert Counter(shards.labels.tolist()) == {0: 1, 1: 6, 2: 6}
    assert len((tmp_path / "out" / "train" / "left_out.txt").read_text().splitlines()) == 2


# Shards


def test_images_of_any_name_in_unlabeled_shards(tmp_path):
    members = {
        "a.v2.jpg": image(1, form="jpeg"), "b.v1.png": image(2), "b.v2.png": image(3), "c.jpg": image(4, form="jpeg"),
        "d.tif": image(5, form="tiff"), "e.bmp": image(6, form="bmp"), "f.GIF": image(7, form="gif"),
        "g.jfif": image(8, form="jpeg"), "h.txt": b"text", "i.json": b"{}", "j": b"", "k.tif": b"none",
        "l.png": image(9), "l.seg.png": image(10),
    }  # fmt: skip
    source = tree(tmp_path / "src", {"a-0.tar": tar(members)})
    found = reading(source)
    images = found.open()[""]
    expected = [
        data for name, data in members.items() if name not in ("h.txt", "i.json", "j", "k.tif", "l.seg.png")
    ]
    assert [images[i].image for i in range(len(images))] == expected
    assert found.unpacked == {".txt": 1, ".json": 1, ".no suffix": 1, ".tif": 1, ".seg.png": 1}
    assert [ShardSet.open(source).read(i) for i in range(9)] == expected
    assert ShardSet.open(source).passed_over == {"txt": 1, "json": 1, "no suffix": 1, "tif": 1, "seg.png": 1}


def test_labels_belong_to_images_whose_names_hold_dots(tmp_path):
    members = {
        "a.v2.jpg": image(1),
        "a.v2.cls": b"1",
        "b.v1.png": image(2),
        "b.cls": b"2",
        "m.seg.png": image(5),
    }
    (tmp_path / "a.tar").write_bytes(tar(members))
    scan = scan_shard(tmp_path / "a.tar")
    assert [(sample.key, sample.label) for sample in scan.samples] == [("a.v2", 1), ("b.v1", 2)]
    assert scan.passed_over == {"seg.png": 1}
    (tmp_path / "a.tar").write_bytes(tar({"a.v1.png": image(1), "a.v2.png": image(2), "a.cls": b"1"}))
    with pytest.raises(UserError, match=r"'a' has 2 images \(v1.png, v2.png\)"):
        scan_shard(tmp_path / "a.tar")


# Names that are no UTF-8


@pytest.mark.parametrize("archived", [False, True])
def test_names_that_are_no_utf_8(tmp_path, capsys, archived):
    source = tree(tmp_path / "src", photographs() | {"train/cat/bad.png": b"x"})
    for old, new in (
        (b"train/cat/bad", b"train/cat/b\xe4d"),
        (b"train/dog", b"train/d\xf6g"),
        (b"val/dog", b"val/d\xf6g"),
    ):
        end = b".png" * old.endswith(b"bad")
        os.rename(os.fsencode(source / os.fsdecode(old + end)), os.fsencode(source / os.fsdecode(new + end)))
    if archived:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            archive.add(source, ".")
        source = tmp_path / "a.tar"
        source.write_bytes(buffer.getvalue())
    for workers in (0, 2):
        out = tmp_path / f"out{workers}"
        assert run_tool("make_shards", source, out, "--workers", workers) == 0
        assert (
            r"left out: tr" in (shown := capsys.readouterr()).err and "2 classes, cat, d\\xf6g" in shown.out
        )
        shards = ShardSet.open(out / "val")
        assert shards.classes == ["cat", "d\\xf6g"] and len(shards) == 12


def test_a_source_or_destination_that_is_no_utf_8(tmp_path, capsys):
    source = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    tree(Path(source), photographs())
    assert run_tool("make_shards", source, source + "out", "--workers", 0) == 0
    assert "/\\xffout/train: 12 images, 0 left out" in capsys.readouterr().out
    assert run_tool("make_shards", source + "none", source + "out") == EXIT_USAGE
    assert "\\xffnone: no such file or folder" in capsys.readouterr().err


# Any tree


FOLDERS = st.lists(
    st.sampled_from(["train", "Val", "test", "cat", "dog", ".git", "images", "a b"]), max_size=3
)
FILES = st.sampled_from(
    ["0.png", "1.JPG", "2.heic", "3", "notes.txt", ".hidden.png", "labels.csv", "a.tar", "x.tar.gz"]
)
PATHS = st.builds(lambda folders, file: "/".join([*folders, file]), FOLDERS, FILES)


@settings(max_examples=150, deadline=None)
@given(paths=st.sets(PATHS, min_size=1, max_size=8))
def test_every_file_of_any_tree_is_packed_or_counted(paths):
    """Or the tree is refused in one line; labels are the names of folders in the path."""
    with tempfile.TemporaryDirectory() as folder:
        kept = {path for path in paths if not any(other.startswith(f"{path}/") for other in paths)}
        data = {"0.png": image(0), "1.JPG": image(1, form="jpeg"), "3": image(2)}
        source = tree(Path(folder) / "src", {path: data.get(path.rpartition("/")[2], b"x") for path in kept})
        try:
            found = reading(source)
            images = found.open()
        except UserError as error:
            assert "\n" not in str(error)
            return
        visible = [path for path in kept if ".git" not in path.split("/")]
        counted = found.unpacked.total() - found.unpacked["hidden folder"]
        assert sum(map(len, images.values())) + counted == len(visible)
        for split in images.values():
            for i in range(len(split)):
                item = split[i]
                assert item.label is None or split.classes[item.label] in item.where.split("/")
