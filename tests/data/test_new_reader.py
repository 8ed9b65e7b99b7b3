"""A reader of one's own: a file among the readers, found without an entry anywhere."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from framework.data.packing import readers
from framework.data.packing.place import open_folder
from framework.data.packing.readers import all_readers
from framework.data.packing.rows import Row, reading_of_rows
from framework.data.shards.index import ShardSet
from framework.runtime.errors import UserError
from framework.runtime.exit_status import EXIT_USAGE
from tests.support.commands import run_tool
from tests.support.packing import reading, refused
from tests.support.toy_images import image, tree

README = Path(__file__).parents[2] / "framework" / "data" / "README.md"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "work"


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
        f"{source}: not packed: 1 .png, 1 row without an image (images/9.png)",
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
        ("test 9.png cat\n", "none of the 1 images listed by split-txt is there"),
        ("", "none of the 0 images listed by split-txt is there"),
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


def test_rows_may_be_parts_of_a_file(tmp_path):
    """Many images in one file: each is packed from its own bytes, and the file is not counted as left out."""
    pictures = [image(i) for i in range(5)]
    ends = np.cumsum([len(picture) for picture in pictures]).tolist()
    place = open_folder(tree(tmp_path / "src", {"all.bin": b"".join(pictures), "all.idx": b""}))
    rows = [
        Row("all.bin", "test" if i > 2 else "train", f"class{i % 2}", end - len(picture), len(picture))
        for i, (end, picture) in enumerate(zip(ends, pictures, strict=True))
    ]
    found = reading_of_rows("mine", place, rows, tables=["all.idx"])
    splits = found.open()
    assert not found.unpacked
    packed = [splits[split][i].image for split in ("train", "test") for i in range(len(splits[split]))]
    assert packed == pictures
    assert [splits[split].labels.tolist() for split in ("train", "test")] == [[0, 1, 0], [1, 0]]
    assert splits["test"][0].where == f"all.bin[{ends[2]}:{ends[3]}]"
    with pytest.raises(
        UserError, match=r"all\.bin\[0:\d+\] is listed twice, as \('train', 'class0'\) and \('test'"
    ):
        reading_of_rows("mine", place, [*rows, rows[0]._replace(split="test")])


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
