"""What lies at a source: which reader takes it, or what would choose one; never a silent guess."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
import shlex
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from framework.data.packing import readers
from framework.data.packing.packer import Packing, pack_splits
from framework.data.packing.place import open_folder
from framework.data.packing.readers import all_readers, read
from framework.data.packing.reading import Choices, check_apart
from framework.data.packing.rows import Row, reading_of_rows
from framework.data.shards.index import ShardSet
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


# Shards


def test_shards_of_several_sets_are_never_mixed(tmp_path, work):
    files = {
        f"imagenet-{split}-{i:03d}.tar": shard(100 * len(split) + 10 * i)
        for split in ("train", "val")
        for i in range(2)
    }
    source = tree(tmp_path / "src", files)
    message = refused(source, work)
    assert "imagenet-train-*.tar (2), imagenet-val-*.tar (2)" in message
    found = reading(f"{source}/imagenet-train-{{000..001}}.tar", work).open()[""]
    expected = [image(500 + 10 * k + i) for k in range(2) for i in range(4)]
    assert [found[i].image for i in range(8)] == expected
    assert len(reading(f"{source}/*val*.tar", work).open()[""]) == 8
    assert len(reading(f"{source}/*.tar", work).open()[""]) == 16  # who says so may
    several = [str(source / name) for name in sorted(files)[:2]]
    assert len(read(several, Choices(), work, work, 1).open()[""]) == 8
    assert "no such shard; the folder has imagenet-train-*.tar (2)" in refused(
        f"{source}/a-{{0..1}}.tar", work
    )
    with pytest.raises(UserError, match="name one source, or shards"):
        read([str(source), str(tmp_path)], Choices(), work, work, 1)


def test_identifiers_become_numbers_the_same_in_all_splits(tmp_path, work):
    def labeled(first: int, labels: list[int]) -> bytes:
        return tar({f"{i}.{end}": data for i, label in enumerate(labels)
                    for end, data in (("png", image(first + i)), ("cls", b"%d" % label))})  # fmt: skip

    source = tree(
        tmp_path / "src",
        {"train/a-0.tar": labeled(0, [1440764, 2084071, 1440764]), "val/a-0.tar": labeled(9, [2084071])},
    )
    found = reading(source, work).open()
    assert found["train"].labels.tolist() == [0, 1, 0]
    assert found["val"].labels.tolist() == [1]
    assert found["val"].classes == found["train"].classes == ["1440764", "2084071"]
    small = tree(tmp_path / "small", {"a-0.tar": labeled(0, [7, 999])})  # numbers of classes
    assert reading(small, work).open()[""].labels.tolist() == [7, 999]


@pytest.mark.parametrize(
    ("values", "labels", "classes"),
    [([1, 0, 1], [1, 0, 1], None), (["dog", "cat", "dog"], [1, 0, 1], ["cat", "dog"])],
)
def test_labels_in_json_are_taken_over(tmp_path, work, values, labels, classes):
    members = {}
    for i, value in enumerate(values):
        members |= {f"{i}.png": image(i), f"{i}.json": json.dumps({"label": value, "width": 12}).encode()}
    found = reading(tree(tmp_path / "src", {"a-0.tar": tar(members)}), work)
    images = found.open()[""]
    assert (images.labels.tolist(), images.classes) == (labels, classes)
    assert not found.unpacked
    by_width = reading(tmp_path / "src", work, label_column="width").open()[""]
    assert by_width.labels.tolist() == [12] * 3
    assert "not every sample's .json has a number or text as height" in refused(
        tmp_path / "src", work, label_column="height"
    )


# Torchvision's sets


@pytest.mark.parametrize(
    "archive", ["cifar-10-python.tar.gz", "cifar-100-python.tar.gz", "stl10_binary.tar.gz"]
)
def test_a_download_that_is_still_packed_says_how_to_unpack_it(tmp_path, work, archive):
    inside = {
        "cifar-10-python": "cifar-10-batches-py",
        "cifar-100-python": "cifar-100-python",
        "stl10_binary": "stl10_binary",
    }
    folder = inside[archive.partition(".")[0]]
    tree(tmp_path / "src", {archive: gzip.compress(tar({f"{folder}/data": b"x"}))})
    for source in (tmp_path / "src", tmp_path / "src" / archive):
        message = refused(source, work)
        assert f"unpack it (tar xf {archive}) and name the folder in which {folder} then lies" in message


@pytest.mark.parametrize("root", ["", "stl10_binary", ".."])
def test_an_incomplete_set_names_the_file(tmp_path, work, root):
    source = tree(tmp_path / "up" / "src", {"stl10_binary/train_X.bin": b"x"})
    message = refused(os.path.normpath(source / root), work)
    assert "STL-10 not found or corrupted: stl10_binary/train_X.bin is damaged" in message
    assert "it comes in stl10_binary.tar.gz" in message and "download=True" not in message
    (source / "stl10_binary" / "train_X.bin").rename(source / "stl10_binary" / "test_X.bin")
    assert "stl10_binary/train_X.bin is missing" in refused(source, work)


# Archives


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.bz2", "tar.xz"])
def test_other_archives_give_the_images_of_the_folder(tmp_path, work, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in PHOTOS.items():
                archive.writestr(name, data)
    else:
        pack = {"tar": bytes, "tar.bz2": bz2.compress, "tar.xz": lzma.compress}[kind]
        path.write_bytes(pack(tar(PHOTOS)))
    found = reading(path, work).open()
    assert sizes(found) == {"train": 12, "val": 12}
    assert {found["val"][i].where: found["val"][i].image for i in range(12)} == {
        name: data for name, data in PHOTOS.items() if name.startswith("val")
    }
    assert not any(work.iterdir())


# Going on


def test_a_source_of_several_splits_goes_on_with_those_that_are_not_finished(tmp_path, work):
    splits = reading(tree(tmp_path / "src", PHOTOS), work).open()
    dest, packing = tmp_path / "out", Packing(5)
    for split, _, _ in pack_splits(splits, dest, packing, 0):
        if split == "val":
            break
    finished = snapshot(dest / "train")
    counts = Counter()
    for split, samples, _ in pack_splits(splits, dest, packing, 0):
        counts[split] += samples
    assert counts == {"train": 12, "val": 12}
    assert snapshot(dest / "train") == finished
    assert sorted(path.name for path in dest.iterdir()) == ["train", "val"]
    assert np.bincount(ShardSet.open(dest / "val").labels).tolist() == [6, 6]
    with pytest.raises(UserError, match="train: is not empty"):
        list(pack_splits(splits, dest, packing, 0))


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


@pytest.fixture
def another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """Lays ``another.py`` among the readers; returns its path."""
    file = tmp_path / "readers" / "another.py"

    def lay(text: str) -> Path:
        file.parent.mkdir()
        file.write_text(text)
        monkeypatch.setattr(readers, "__path__", [*readers.__path__, str(file.parent)])
        all_readers.cache_clear()
        return file

    yield lay
    all_readers.cache_clear()
    sys.modules.pop("framework.data.packing.readers.another", None)


SPLIT_TXT = "train 0.png cat\ntrain 1.png big dog\ntrain 2.png cat\ntest 3.png cat\ntest 4.png big dog\n"


def test_a_file_among_the_readers_is_a_new_data_set(tmp_path, another, capsys):
    """The README's example: found without an entry anywhere, it packs."""
    (example,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    another(example)
    names = [reader.name for reader in all_readers()]
    assert names.index("split-txt") < names.index("table")
    images = {f"images/{i}.png": image(i) for i in range(6)}  # the last one has no row
    source = tree(tmp_path / "src", {**images, "split.txt": f"{SPLIT_TXT}test 9.png cat\n".encode()})
    assert run_tool("make_shards", source, tmp_path / "out", "--workers", 0) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == [
        f"{source}: read as 'split-txt': train 3 images, test 2 images; 2 classes, big dog, cat",
        f"{source}: not packed: 1 .png, 1 rows without an image",
    ]
    for split, labels in {"train": [1, 2], "test": [1, 1]}.items():
        shards = ShardSet.open(tmp_path / "out" / split)
        assert (shards.classes, np.bincount(shards.labels).tolist()) == (["big dog", "cat"], labels)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (SPLIT_TXT + "test 9.png bird\n", "no image of class 'bird' is there, so it would be missing"),
        (SPLIT_TXT + "val 9.png cat\n", "no image of split 'val' is there, so it would be missing"),
        (
            SPLIT_TXT + "test 0.png cat\n",
            "images/0.png is listed twice, as ('train', 'cat') and ('test', 'cat')",
        ),
        (SPLIT_TXT + "test 5.png\n", "split.txt, line 6: must read SPLIT FILE CLASS"),
        ("test 9.png cat\n", "none of the 1 files listed by split-txt is there"),
        ("", "none of the 0 files listed by split-txt is there"),
    ],
)
def test_rows_that_lose_a_class_or_contradict_each_other_are_refused(tmp_path, work, another, text, problem):
    (example,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    another(example)
    images = {f"images/{i}.png": image(i) for i in range(6)}
    assert problem in refused(tree(tmp_path / "src", {**images, "split.txt": text.encode()}), work)


@pytest.mark.parametrize(("labels", "splits", "problem"), [
    (("cat", ""), ("train", "train"), "some images have a class, such as 'cat', and some have none"),
    (("cat", "cat"), ("train", ""), "some images have a split, such as 'train', and some have none"),
    (("", ""), ("", ""), ""),
])  # fmt: skip
def test_all_rows_have_a_class_or_none_has(tmp_path, labels, splits, problem):
    place = open_folder(tree(tmp_path / "src", {f"{i}.png": image(i) for i in range(2)}))
    rows = [
        Row(f"{i}.png", split, label) for i, (split, label) in enumerate(zip(splits, labels, strict=True))
    ]
    if problem:
        with pytest.raises(UserError, match=problem):
            reading_of_rows("mine", place, rows)
    else:
        found = reading_of_rows("mine", place, rows)
        assert (found.summary, found.open()[""].labels) == ("2 images, no classes", None)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "{}: must define READER, a Reader (or READERS, several)"),
        ("READER = 3\n", "{}: must define READER, a Reader (or READERS, several)"),
        (
            "\nimport nowhere\n",
            "{}, line 2: can't be imported: ModuleNotFoundError: No module named 'nowhere'",
        ),
        ("x = (\n", "{}, line 1: can't be imported: '(' was never closed"),
        (
            "from framework.data.packing.readers.tables import READERS\n",
            "{folder}/tables.py: {} has a reader named table, too",
        ),
    ],
)
def test_a_file_that_defines_no_reader_is_one_line(another, text, problem, capsys, tmp_path):
    file = another(text)
    assert run_tool("make_shards", tmp_path, tmp_path / "out") == EXIT_USAGE
    assert capsys.readouterr().err == f"error: {problem.format(file, folder=readers.__path__[0])}\n"


@pytest.mark.parametrize(
    "files",
    [
        {"images/0.png": b""},
        {"toy/images/0.png": b"", "toy/split.txt": b""},
        {"toy/my_images-256/0.png": b""},
        {"birds/0.png": b"", "labels.txt": b""},
        {"PNG/0.png": b"", "README.md": b""},
    ],
)
def test_one_folder_that_only_holds_the_images_is_not_taken_for_a_class_in_silence(tmp_path, work, files):
    source = tree(tmp_path / "src", files)
    message = refused(source, work)
    assert "--as 'class' (1 images, 1 class) or --as 'images' (1 images, no classes)" in message
    assert reading(source, work, reader="images").open()[""].labels is None


def write_table() -> None:
    """Write the README's table of readers anew: ``python -m tests.data.test_readers``."""
    lines = README.read_text().splitlines(keepends=True)
    head = next(number for number, line in enumerate(lines) if line.startswith("| `--as` |")) + 2
    end = next(number for number in range(head, len(lines)) if not lines[number].startswith("|"))
    README.write_text("".join([*lines[:head], *(f"{row}\n" for row in table()), *lines[end:]]))


if __name__ == "__main__":
    write_table()
