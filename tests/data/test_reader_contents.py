"""What readers find in a source: identifiers, labels, archives."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from framework.data.packing.packer import Packing, pack_splits
from framework.data.packing.readers import read
from framework.data.packing.reading import Choices
from framework.data.shards.index import ShardSet
from framework.runtime.errors import UserError
from tests.support.packing import reading, refused, sizes, snapshot
from tests.support.toy_images import (
    image,
    photographs,
    shard,
    tar,
    tree,
)

PHOTOS = photographs()


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "work"


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
