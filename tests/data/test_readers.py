"""What lies at a source: which reader takes it, or what would choose one; never a silent guess."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from framework.data.packing.readers import all_readers
from framework.data.packing.reading import check_apart
from framework.runtime.errors import UserError
from framework.runtime.exit_status import EXIT_USAGE
from tests.support.commands import run_tool
from tests.support.packing import classes_of, reading, refused, sizes, snapshot
from tests.support.toy_images import (
    image,
    imagenet_train,
    photographs,
    shard,
    tar,
    tree,
)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "work"


PHOTOS = photographs()
TRAIN = photographs(("train/",))
FLAT = {f"{split}/{i}.png": image(i) for split in ("train", "test") for i in range(3)}


@pytest.mark.parametrize(
    ("change", "splits"),
    [
        (lambda name: f"imagenette2/{name}", {"train", "val"}),
        (lambda name: f"a/b/c/{name}", {"train", "val"}),
        (lambda name: name.replace("train", "Train").replace("val", "VAL"), {"train", "val"}),
        (lambda name: name.replace("val", "Validation"), {"train", "validation"}),
        (lambda name: name.replace("train/", "train2017/"), {"train2017", "val"}),
    ],
)
def test_splits_are_found_below_other_folders_and_in_other_capitals(tmp_path, work, change, splits):
    found = reading(tree(tmp_path / "src", {change(name): data for name, data in PHOTOS.items()}), work)
    assert found.reader == "split/class"
    images = found.open()
    assert images.keys() == splits
    for split in images.values():
        assert split.classes == ["cat", "dog"]
        assert all(f"/{name}/" in file for file, name in classes_of(split).items())


def test_one_folder_around_unlabeled_splits_or_classes_is_no_class(tmp_path, work):
    splits = reading(tree(tmp_path / "a", {f"data/{name}": data for name, data in FLAT.items()}), work)
    assert (splits.reader, sizes(splits.open())) == ("split", {"train": 3, "test": 3})
    classes = tree(tmp_path / "b", {f"photos/{name}": data for name, data in photographs(("",)).items()})
    (images,) = reading(classes, work).open().values()
    assert images.classes == ["cat", "dog"]


@pytest.mark.parametrize(
    "litter", [".ipynb_checkpoints/0.png", "__MACOSX/0.png", ".git/a", "@eaDir/0.png", "lost+found/0.png"]
)
def test_hidden_folders_are_no_classes(tmp_path, work, litter):
    files = {f"train/{litter}": image(0), f"val/{litter}": image(0), **PHOTOS}
    found = reading(tree(tmp_path / "src", files), work)
    assert [images.classes for images in found.open().values()] == [["cat", "dog"]] * 2
    assert found.unpacked == {"hidden folder": 2}


@pytest.mark.parametrize(
    ("files", "options"),
    [
        ({"animals/cat/0.png": b"", "vehicles/bus/0.png": b""}, {"split/class", "class"}),
        ({"train/0.png": b"", "test/0.png": b"", "other/0.png": b""}, {"class", "split"}),
        ({"train/images/0.png": b"", "val/images/0.png": b""}, {"split", "split/class"}),
        ({**PHOTOS, "data.tar": shard(0)}, {"split/class", "shards"}),
        ({"cifar-10-batches-py/data_batch_1": b"", "stl10_binary/train_X.bin": b""}, {"cifar10", "stl10"}),
        ({"cifar-10-batches-py/data_batch_1": b"", "cifar-100-python/train": b""}, {"cifar10", "cifar100"}),
        ({"cifar-10-batches-py/data_batch_1": b"", "train_32x32.mat": b""}, {"cifar10", "svhn"}),
        ({**PHOTOS, "test_32x32.mat": b""}, {"split/class", "svhn"}),
        ({**PHOTOS, "ILSVRC2012_img_train.tar": tar(imagenet_train())}, {"split/class", "imagenet"}),
        (
            {"train/n01440764.tar": tar({"a.JPEG": image(0)}), "train/n01440764/0.png": b""},
            {"split/class", "imagenet"},
        ),
        ({"cat/0.png": image(0), "a-0.tar": shard(0)}, {"class", "shards"}),
        ({"0.png": image(0), "train/n01440764.tar": tar({"a.JPEG": image(0)})}, {"images", "imagenet"}),
        ({**PHOTOS, "labels.csv": b"file,label\ntrain/cat/0.png,x\n"}, {"split/class", "table"}),
    ],
)
def test_what_can_be_read_in_several_ways_is_refused_with_the_options(tmp_path, work, files, options):
    source = tree(tmp_path / "src", files)
    before = snapshot(source)
    message = refused(source, work)
    assert f"can be read in {len(options)} ways" in message
    assert all(f"--as '{option}'" in message for option in options)
    for option in options:
        assert reading(source, work, reader=option).reader == option
    assert snapshot(source) == before


def test_a_choice_decides_what_splits_and_classes_are(tmp_path, work):
    files = {
        f"{a}/{b}/{i}.png": image(i) for a, b in (("animals", "cat"), ("vehicles", "bus")) for i in (0, 1)
    }
    source = tree(
        tmp_path / "src", {name.replace("/0.png", "/deep/0.png"): data for name, data in files.items()}
    )
    as_classes = reading(source, work, reader="class").open()[""]
    assert as_classes.classes == ["animals", "vehicles"]
    as_splits = reading(source, work, reader="split/class").open()
    assert {split: set(classes_of(images).values()) for split, images in as_splits.items()} == {
        "animals": {"cat"},
        "vehicles": {"bus"},
    }
    flat = reading(source, work, reader="images").open()[""]
    assert (len(flat), flat.labels) == (4, None)
    assert sizes(reading(source, work, reader="split").open()) == {"animals": 2, "vehicles": 2}
    assert "needs split/class/IMAGE, which 0.png is not" in refused(
        tree(tmp_path / "flat", {"0.png": image(0)}), work, reader="split/class"
    )
    assert "is not what --as 'svhn' reads" in refused(source, work, reader="svhn")


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"a/train/0.png": b"", "b/train/0.png": b"", "b/test/0.png": b""}, "holds splits in each of a, b"),
        ({f"{s}/{n}": b"" for s in ("cifar", "stl") for n in PHOTOS}, "holds splits in each of cifar, stl"),
        (
            {**TRAIN, "val/0.png": b""},
            r"all alike; val/0.png does not; sort val/ into folders of classes.*--skip val",
        ),
        ({"Train/cat/0.png": b"", "train/cat/0.png": b""}, "Train/ and train/ are the same split"),
        ({"train/a-0.tar": shard(0), "Train/a-0.tar": shard(1)}, "are the same split"),
        ({"a-0.tar": shard(0), "train/a-0.tar": shard(1)}, "holds shards, and so do its folders train"),
        (
            {**TRAIN, "val/a-0.tar": shard(0)},
            r"the split val would be missing: .*1 .tar.* or choose --as 'shards'",
        ),
        ({"a-0.tar": shard(0), "a-1.tar.gz": b""}, "1 .tar and 1 compressed ones such as a-1.tar.gz"),
        ({"a-0.tar": shard(0), "a-1.tgz": b""}, "1 .tar and 1 compressed ones such as a-1.tgz"),
        (
            {"images.tar.gz": b"", "notes.txt": b""},
            "holds no images but 1 archives such as images.tar.gz; name one",
        ),
        ({"a.mp4": b"", "b.mp4": b"", "c": b"x"}, "holds no images .* but 2 .mp4, 1 without suffix"),
    ],
)
def test_what_fits_no_reading_gets_one_line_that_says_what_to_do(tmp_path, work, files, problem):
    source = tree(tmp_path / "src", files)
    message = refused(source, work)
    assert re.search(problem, message), message


def test_the_command_says_what_it_read_before_it_packs(tmp_path, capsys):
    source = tree(
        tmp_path / "src", {**PHOTOS, "train/.ipynb_checkpoints/0.png": b"", "notes.txt": b"", "x.csv": b""}
    )
    before = snapshot(source)
    assert run_tool("make_shards", source, tmp_path / "out", "--workers", 0) == 0
    printed = capsys.readouterr().out.splitlines()
    assert (
        printed[0] == f"{source}: read as 'split/class': train 12 images, val 12 images; 2 classes, cat, dog"
    )
    assert printed[1].startswith(f"{source}: not packed: ")
    assert set(printed[1].partition("packed: ")[2].split(", ")) == {"1 hidden folder", "1 .txt", "1 .csv"}
    assert printed[-1] == f"to train on them: data.path={tmp_path / 'out'}"
    assert snapshot(source) == before


@pytest.mark.parametrize(
    "arguments", [["--as", "nonsense"], ["--workers", "-1"], ["--quality", "101"], ["--cache-gb", "nan"]]
)
def test_a_wrong_argument_is_one_line(tmp_path, capsys, arguments):
    assert run_tool("make_shards", tmp_path, tmp_path / "out", *arguments) == EXIT_USAGE
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: argument ")


def test_nothing_is_written_into_the_source(tmp_path, work):
    source = tree(tmp_path / "src", {"a-000.tar": shard(0), "a-001.tar": shard(10)})
    before = snapshot(source)
    assert sizes(reading(source, work).open()) == {"": 8}
    assert snapshot(source) == before
    for inside in (source, source / "out", tmp_path / "src" / ".." / "src" / "a"):
        with pytest.raises(UserError, match=r"lies in .*src, which is only read"):
            check_apart(str(source), inside)
    check_apart(str(source), tmp_path / "src2")
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(UserError, match="which is only read"):
        check_apart(str(source), tmp_path / "link" / "out")


# The registry


README = Path(__file__).parents[2] / "framework" / "data" / "README.md"


def table() -> list[str]:
    return [f"| `{reader.name}` | {reader.recognizes} | {reader.becomes} |" for reader in all_readers()]


def test_every_reader_is_in_the_help_and_in_the_readme(capsys):
    assert run_tool("make_shards", "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    for reader in all_readers():
        assert f"{reader.name} {reader.recognizes} -> {reader.becomes}".replace("`", "") in shown
    lines = README.read_text().splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith("| `--as` |"))
    assert lines[head + 2 : head + 3 + len(all_readers())] == [*table(), ""]


def test_names_of_readers_need_no_quotes_but_a_slash():
    assert all(shlex.quote(reader.name) == reader.name for reader in all_readers())
    assert len({reader.name for reader in all_readers()}) == len(all_readers())


def write_table() -> None:
    """Write the README's table of readers anew: ``python -m tests.data.test_readers``."""
    lines = README.read_text().splitlines(keepends=True)
    head = next(number for number, line in enumerate(lines) if line.startswith("| `--as` |")) + 2
    end = next(number for number in range(head, len(lines)) if not lines[number].startswith("|"))
    README.write_text("".join([*lines[:head], *(f"{row}\n" for row in table()), *lines[end:]]))


if __name__ == "__main__":
    write_table()
