"""ImageNet as people have it: downloads, archives of classes, folders beside them, Kaggle's copy."""

from __future__ import annotations

import csv
import gzip
import re
import subprocess
from pathlib import Path

import pytest

from framework.data.packing.packer import Packing, pack_splits
from tests.support.packing import classes_of, reading, refused, sizes, snapshot
from tests.support.toy_images import (
    VAL_CLASSES,
    WNIDS,
    image,
    imagenet_kit,
    imagenet_train,
    imagenet_val,
    photographs,
    tar,
    tree,
)

PHOTOS, TRAIN = photographs(), photographs(("train/",))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "work"


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    files = {
        "ILSVRC2012_img_train.tar": tar(imagenet_train()),
        "ILSVRC2012_img_val.tar": tar(imagenet_val()),
        "ILSVRC2012_devkit_t12.tar.gz": gzip.compress(tar(imagenet_kit())),
    }
    return tree(tmp_path / "downloads", files)


@pytest.mark.parametrize("kit", ["packed", "unpacked"])
def test_imagenets_downloads_are_read_as_they_are(downloads, work, kit):
    if kit == "unpacked":
        (downloads / "ILSVRC2012_devkit_t12.tar.gz").unlink()
        tree(downloads, imagenet_kit())
    before = snapshot(downloads)
    found = reading(downloads, work)
    assert found.reader == "imagenet" and not found.unpacked
    images = found.open()
    assert sizes(images) == {"train": 9, "val": 4}
    assert images["train"].classes == images["val"].classes == list(WNIDS)
    for k, wnid in enumerate(WNIDS):
        for i in range(3):
            where, data, label = images["train"][3 * k + i]
            assert (where, data, label) == (f"{wnid}/{wnid}_{i}.JPEG", image(10 * k + i, form="jpeg"), k)
    assert images["val"].labels.tolist() == list(VAL_CLASSES)
    assert [images["val"][i].image for i in range(4)] == list(imagenet_val().values())
    assert snapshot(downloads) == before
    assert not any(work.iterdir())


def test_imagenets_archives_give_the_shards_of_its_folders(downloads, tmp_path, work):
    folders = {
        f"train/{wnid}/{wnid}_{i}.JPEG": image(10 * k + i, form="jpeg")
        for k, wnid in enumerate(WNIDS)
        for i in range(3)
    }
    for dest, source in (("a", downloads), ("b", tree(tmp_path / "folders", folders))):
        splits = {"train": reading(source, work).open()["train"]}
        list(pack_splits(splits, tmp_path / dest, Packing(4), workers=2 if dest == "a" else 0))
    a, b = ({path.name: path.read_bytes() for path in (tmp_path / dest / "train").iterdir()} for dest in "ab")
    assert a == b


def test_each_of_imagenets_archives_alone(downloads, work):
    train = reading(downloads / "ILSVRC2012_img_train.tar", work).open()
    assert sizes(train) == {"train": 9} and train["train"].classes == list(WNIDS)
    val = reading(downloads / "ILSVRC2012_img_val.tar", work).open()
    assert val["val"].labels.tolist() == list(VAL_CLASSES)
    (downloads / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    assert "has no labels; lay ILSVRC2012_devkit_t12.tar.gz" in refused(
        downloads / "ILSVRC2012_img_val.tar", work
    )
    assert "has no labels; lay ILSVRC2012_devkit_t12.tar.gz" in refused(downloads, work)
    only = reading(downloads, work, skip=["ILSVRC2012_img_val.tar"])
    assert sizes(only.open()) == {"train": 9} and only.unpacked == {"skipped as asked": 1}


def test_archives_of_classes(tmp_path, work):
    source = tree(tmp_path / "src", {f"train/{name}": data for name, data in imagenet_train().items()})
    found = reading(source, work).open()
    assert sizes(found) == {"train": 9} and found["train"].classes == list(WNIDS)
    assert found["train"][3].image == image(10, form="jpeg")
    assert sizes(reading(source / "train", work).open()) == {"": 9}


def test_a_download_beside_folders(downloads, tmp_path, work):
    """With its labels it can be read, too; without, the folders are all there is."""
    source = tree(tmp_path / "src", PHOTOS)
    (source / "ILSVRC2012_img_val.tar").write_bytes((downloads / "ILSVRC2012_img_val.tar").read_bytes())
    found = reading(source, work)
    assert (found.reader, found.unpacked) == ("split/class", {".tar": 1})
    kit = "ILSVRC2012_devkit_t12.tar.gz"
    (source / kit).write_bytes((downloads / kit).read_bytes())
    assert "--as 'imagenet' (val from ILSVRC2012_img_val.tar) or --as 'split/class'" in refused(source, work)
    assert sizes(reading(source, work, reader="imagenet").open()) == {"val": 4}


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        (
            "ILSVRC2012_img_val.tar",
            tar(dict(list(imagenet_val().items())[:3])),
            "has 3 validation images, and .* labels 4",
        ),
        (
            "ILSVRC2012_img_train.tar",
            tar(dict(list(imagenet_train().items())[:2])),
            "n02084071.* and not in its archives",
        ),
        ("ILSVRC2012_img_train.tar", tar(imagenet_train())[:-11000], "not a whole tar|truncated or damaged"),
        ("ILSVRC2012_devkit_t12.tar.gz", b"\x1f\x8bx", "not a whole development kit"),
        (
            "ILSVRC2012_devkit_t12.tar.gz",
            gzip.compress(tar({"a/data/meta.mat": b"x"})),
            "not a whole development kit",
        ),
    ],
    ids=[
        "images missing",
        "class missing",
        "cut off",
        "no gzip",
        "no kit",
    ],  # the bytes hold times: no names of tests
)
def test_damaged_downloads_are_named(downloads, work, name, content, problem):
    (downloads / name).write_bytes(content)
    message = refused(downloads, work)
    assert re.search(problem, message), message


def test_validation_images_without_classes_get_advice(tmp_path, work):
    flat = {f"val/{name}": data for name, data in imagenet_val().items()}
    assert "val/ holds ImageNet's validation images without folders of classes; sort" in refused(
        tree(tmp_path / "a", {**TRAIN, **flat}), work
    )
    message = refused(tree(tmp_path / "b", imagenet_val()), work)
    assert "without folders of classes" in message and "--as 'images' (4 images, no classes)" in message
    assert len(reading(tmp_path / "b", work, reader="images").open()[""]) == 4


def test_kaggles_imagenet_gets_a_command_that_works(tmp_path, work):
    root = "ILSVRC/Data/CLS-LOC"
    files = {f"{root}/train/{wnid}/{wnid}_1.JPEG": image(k) for k, wnid in enumerate(WNIDS)}
    files |= {f"{root}/val/{name}": data for name, data in imagenet_val().items()}
    files |= {f"{root}/test/ILSVRC2012_test_00000001.JPEG": image(9), "ILSVRC/Annotations/a.xml": b""}
    source = tree(tmp_path / "src", files)
    with (source / "LOC_val_solution.csv").open("w") as file:
        csv.writer(file).writerows(
            [("ImageId", "PredictionString"),
             *((name[:-5], f"{WNIDS[c]} 1 2 3 4 ") for name, c in zip(imagenet_val(), VAL_CLASSES, strict=True))]
        )  # fmt: skip
    message = refused(source, work)
    assert (
        message == refused(source / root, work).replace(f"{root}:", ":", 1) or "Kaggle's ImageNet" in message
    )
    command = message.partition("CLS-LOC run: ")[2].partition("; then pack")[0]
    subprocess.run(["bash", "-c", command], cwd=source / root, check=True)
    assert "--skip test" in message
    found = reading(source / root, work, skip=["test"]).open()
    assert sizes(found) == {"train": 3, "val": 4}
    where = {Path(name).name: wnid for name, wnid in classes_of(found["val"]).items()}
    assert where == {name: WNIDS[c] for name, c in zip(imagenet_val(), VAL_CLASSES, strict=True)}
