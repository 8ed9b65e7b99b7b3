"""Tables of labels beside images, as Hugging Face and Kaggle have them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from framework.data.packing.readers import read
from framework.data.packing.reading import Choices, Reading
from framework.data.packing.rows import sorted_classes
from framework.runtime.errors import UserError
from tests.support.toy_images import image, photographs, tar, tree

IMAGES = {f"{i}.jpg": image(i) for i in range(6)}


def reading(source: Path, **choices: object) -> Reading:
    return read([str(source)], Choices(**choices), source.parent, source.parent / "cache", 10**9)


def labels(found: Reading) -> dict[str, dict[str, str]]:
    """Split -> name of the image -> name of its class."""
    return {
        split: {images[i].where: (images.classes or [])[images[i].label] for i in range(len(images))}
        for split, images in found.open().items()
    }


def refused(source: Path, **choices: object) -> str:
    with pytest.raises(UserError) as error:
        reading(source, **choices).open()
    assert "\n" not in str(error.value)
    return str(error.value)


EXPECTED = {f"{i}.jpg": "ab"[i % 2] for i in range(6)}


@pytest.mark.parametrize(
    "head", ["file_name,label", "filename,class", "image,category", "Image Path,Target", "path,species"]
)
@pytest.mark.parametrize("table", ["labels.csv", "metadata.csv", "Labels.TSV"])
def test_columns_are_known_by_their_names(tmp_path, head, table):
    lines = [head, *(f"{name},{label}" for name, label in EXPECTED.items())]
    text = "\n".join(lines).replace(",", "\t" if table.endswith("TSV") else ",")
    found = reading(tree(tmp_path / "src", IMAGES | {table: text.encode()}))
    assert found.reader == "table" and labels(found) == {"": EXPECTED} and not found.unpacked


def test_json_lines_a_byte_order_mark_and_quotes(tmp_path):
    lines = [json.dumps({"file_name": name, "label": i, "text": "x"}) for i, name in enumerate(IMAGES)]
    found = reading(tree(tmp_path / "a", IMAGES | {"metadata.jsonl": "\n".join(lines).encode()}))
    assert labels(found) == {"": {name: str(i) for i, name in enumerate(IMAGES)}}
    text = 'file_name,label\r\n"0.jpg","a, ""b"""\r\n1.jpg,c\r\n'
    found = reading(tree(tmp_path / "b", IMAGES | {"labels.csv": text.encode("utf-8-sig")}))
    assert labels(found) == {"": {"0.jpg": 'a, "b"', "1.jpg": "c"}}
    assert found.unpacked == {"images without a row in labels.csv": 4}


def test_numbers_are_in_order_and_classes_the_same_in_all_splits(tmp_path):
    files = {f"{split}/{name}": data for split in ("train", "test") for name, data in IMAGES.items()}
    for split, wanted in (("train", [10, 9, 2, 2, 9, 10]), ("test", [2, 9, 2, 9, 2, 9])):
        lines = [json.dumps({"file_name": f"{i}.jpg", "label": label}) for i, label in enumerate(wanted)]
        files[f"{split}/metadata.jsonl"] = "\n".join(lines).encode()
    found = reading(tree(tmp_path / "src", files)).open()
    assert found["train"].classes == found["test"].classes == ["2", "9", "10"]
    assert found["train"].labels.tolist() == [2, 1, 0, 0, 1, 2]


def test_kaggles_way(tmp_path):
    """IDs without suffix, images in train/ and test/, a table of the first alone, and a form to hand in."""
    files = {f"train/{name}": data for name, data in IMAGES.items()} | {"test/7.jpg": image(7)}
    files["labels.csv"] = "\n".join(["id,breed", *(f"{i},{'ab'[i % 2]}" for i in range(6))]).encode()
    files["sample_submission.csv"] = b"id,a,b\n7,0.5,0.5\n"
    found = reading(tree(tmp_path / "src", files))
    assert labels(found) == {"train": {f"train/{name}": label for name, label in EXPECTED.items()}}
    assert found.unpacked == {"images without a row in labels.csv": 1, ".csv": 1}


def test_tables_named_like_splits(tmp_path):
    files = {f"train_images/{name}": data for name, data in IMAGES.items()} | {
        f"test_images/{i}.jpg": image(i) for i in (8, 9)
    }
    files["train.csv"] = "\n".join(["image_id,label", *(f"{i}.jpg,{i % 2}" for i in range(6))]).encode()
    files["test.csv"] = b"image_id,width\n8.jpg,3\n9.jpg,3\n"
    found = reading(tree(tmp_path / "src", files))
    assert {split: len(rows) for split, rows in labels(found).items()} == {"train_images": 6}
    flat = IMAGES | {
        "train.csv": b"image,label\n0.jpg,a\n1.jpg,b\n",
        "valLabels.csv": b"image,label\n2.jpg,a\n",
    }
    assert labels(reading(tree(tmp_path / "flat", flat))) == {
        "train": {"0.jpg": "a", "1.jpg": "b"},
        "val": {"2.jpg": "a"},
    }
    column = IMAGES | {"metadata.csv": b"file_name,label,split\n0.jpg,a,train\n1.jpg,b,train\n2.jpg,a,test\n"}
    assert {s: len(rows) for s, rows in labels(reading(tree(tmp_path / "c", column))).items()} == {
        "train": 2,
        "test": 1,
    }


def test_a_table_in_an_archive(tmp_path):
    """The one folder around is no class."""
    members = IMAGES | {"labels.csv": b"file,label\n0.jpg,a\n1.jpg,b\n"}
    (tmp_path / "a.tar").write_bytes(tar({f"set/{name}": data for name, data in members.items()}))
    assert labels(reading(tmp_path / "a.tar")) == {"": {"set/0.jpg": "a", "set/1.jpg": "b"}}


def test_images_of_one_name_are_told_apart_by_their_folders(tmp_path):
    files = {"a/0.jpg": image(0), "b/0.jpg": image(1), "labels.csv": b"path,label\na/0.jpg,x\nb/0.jpg,y\n"}
    source = tree(tmp_path / "src", files)
    assert labels(reading(source, reader="table")) == {"": {"a/0.jpg": "x", "b/0.jpg": "y"}}
    (source / "labels.csv").write_text("path,label\n0.jpg,x\n")
    assert "line 2: '0.jpg' may be a/0.jpg or b/0.jpg" in refused(source, reader="table")


@pytest.mark.parametrize(
    ("table", "choices", "problem"),
    [
        ("file_name,label,class\n0.jpg,a,b\n", {}, "label and class could each be the label; choose with --label"),
        ("image,file,label\n0.jpg,1.jpg,a\n", {}, "image and file name different images; choose with --file-column"),
        ("file_name,text,score\n0.jpg,a,1\n", {}, "none of its columns text, score is called label or class"),
        ("file_name,label\nx.jpg,a\n", {}, "its column file_name names no image here, such as 'x.jpg'"),
        ("file_name,label\n0.jpg,a\n0.jpg,b\n", {}, "0.jpg has two labels in labels.csv, 'a' and 'b'"),
        ("file_name,label\n0.jpg,a\n1.jpg,\n", {}, "line 3: '1.jpg' has no label"),
        ("file_name,label\n0.jpg,a\nx.jpg,b\n", {}, "no image of class 'b' is there, so it would be missing"),
        ("file_name,label\n0.jpg,a\n", {"label_column": "kind"}, "has no column kind, but file_name, label"),
        ("file_name,label\n0.jpg,a\n", {"file_column": "kind"}, "has no column kind, but file_name, label"),
        ("file_name,label\n\xff", {}, "cannot be read as a table of labels"),
        ('file_name,label\n"0.jpg,a\n', {}, "cannot be read as a table of labels"),
    ],
)  # fmt: skip
def test_what_a_table_leaves_open_is_one_line(tmp_path, table, choices, problem):
    source = tree(tmp_path / "src", IMAGES | {"labels.csv": table.encode("latin-1")})
    assert problem in refused(source, **choices)


def test_options_choose_columns(tmp_path):
    text = b"image,file,label,class\n0.jpg,1.jpg,a,b\n"
    found = reading(
        tree(tmp_path / "src", IMAGES | {"labels.csv": text}), file_column="file", label_column="class"
    )
    assert labels(found) == {"": {"1.jpg": "b"}}


def test_rows_without_an_image_are_counted(tmp_path):
    text = b"file_name,label\n0.jpg,a\n1.jpg,b\nx.jpg,a\ny.jpg,b\n"
    found = reading(tree(tmp_path / "src", IMAGES | {"labels.csv": text}))
    assert found.unpacked == {
        "images without a row in labels.csv": 4,
        "rows of labels.csv without an image": 2,
    }


def test_a_table_that_has_no_labels_leaves_folders_alone(tmp_path):
    captions = {
        "metadata.csv": b"file_name,text,score\ntrain/cat/0.png,a cat,1\n",
        "labels.csv": b"name,number\ncat,0\n",
    }
    found = reading(tree(tmp_path / "src", photographs() | captions))
    assert (found.reader, found.unpacked) == ("split/class", {".csv": 2})


# Separators, headers, splits


@pytest.mark.parametrize("end", ["csv", "tsv", "txt"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("head", ["file_name{}label\n", ""])
def test_a_table_is_read_by_its_own_separator_with_or_without_header(tmp_path, end, separator, head):
    text = head.format(separator) + "".join(f"{name}{separator}{text}\n" for name, text in EXPECTED.items())
    found = reading(tree(tmp_path / "src", IMAGES | {f"labels.{end}": text.encode()}))
    assert found.reader == "table" and labels(found) == {"": EXPECTED} and not found.unpacked


def test_commas_within_values_do_not_separate_where_the_header_says_otherwise(tmp_path):
    text = "file_name;label\n" + "".join(f"{name};{text}, or so\n" for name, text in EXPECTED.items())
    found = reading(tree(tmp_path / "src", IMAGES | {"labels.csv": text.encode()}))
    assert labels(found) == {"": {name: f"{text}, or so" for name, text in EXPECTED.items()}}


def test_lines_of_a_text(tmp_path):
    """Blanks between file and label, in either order; a list for each split."""
    train = b"images/0.jpg  golden retriever\nimages/1.jpg cat\n"
    files = {f"images/{name}": data for name, data in IMAGES.items()}
    files |= {"train.txt": train, "val.txt": b"images/2.jpg cat\n"}
    found = reading(tree(tmp_path / "a", files))
    assert labels(found) == {
        "train": {"images/0.jpg": "golden retriever", "images/1.jpg": "cat"},
        "val": {"images/2.jpg": "cat"},
    }
    numbers = "".join(f"{i % 2} {i}.jpg\n" for i in range(6)).encode()
    found = reading(tree(tmp_path / "b", IMAGES | {"labels.txt": numbers}))
    assert labels(found) == {"": {f"{i}.jpg": str(i % 2) for i in range(6)}}


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("labels.csv", "picture,kind\n0.jpg,a\n", "none of its columns picture, kind is called file_name"),
        ("labels.csv", "0.jpg,a,x\n1.jpg,b,x\n", "its first line must name the columns, such as file_name,label"),
        ("labels.txt", "cat\ndog\n", "is no table of labels; lines must read FILE LABEL"),
        ("labels.csv", "file_name,label\n0.jpg,a, or b\n", "line 2: has 3 values, and there are 2 columns"),
    ],
)  # fmt: skip
def test_a_table_that_nobody_can_read_is_not_passed_over(tmp_path, name, text, problem):
    source = tree(tmp_path / "src", IMAGES | {name: text.encode()})
    assert problem in (message := refused(source)) and "--as 'images'" in message
    assert reading(source, reader="images").unpacked == {f".{name[-3:]}": 1}
    folders = tree(tmp_path / "folders", photographs() | {name: text.encode()})
    assert reading(folders).reader == "split/class"


@pytest.mark.parametrize("text", [b"\xff\xfe", b"some words", b"0.jpg\n1.jpg\n", b""])
def test_texts_that_are_no_tables_are_counted(tmp_path, text):
    for files in (IMAGES, photographs()):
        source = tree(tmp_path / str(len(files)), files | {"train.txt": text})
        assert reading(source).unpacked == {".txt": 1}


LABELS = ["cat", "dog"] * 3


def table(split: str = "", rows: range = range(6)) -> str:
    return "".join(f"{i}.jpg,{LABELS[i]}{split}\n" for i in rows)


@pytest.mark.parametrize("ids", [True, False])
def test_an_image_of_another_split_is_not_taken_for_one_that_is_lost(tmp_path, ids):
    files = {f"train/{i}.jpg": image(i) for i in range(6) if i != 3}
    files |= {f"test/{i}.jpg": image(9 + i) for i in range(6)}
    rows = table().replace(".jpg", "" if ids else ".jpg")
    tables = [
        {"train.csv": f"id,label\n{rows}".encode()},
        {"train/metadata.csv": f"file_name,label\n{rows}".encode()},
        {"labels.csv": f"id,label,split\n{rows.replace('t', 't,train').replace('g', 'g,train')}".encode()},
    ]
    if not ids:
        tables.pop()  # would say .jpg,train
    for i, its in enumerate(tables):
        message = refused(tree(tmp_path / f"{i}", files | its))
        assert "is without an image in train, and test/3.jpg is of test" in message, its
        assert "line 5: " in message
    paths = "file,label\n" + "".join(f"train/{line}\n" for line in rows.split())
    found = reading(tree(tmp_path / "paths", files | {"labels.csv": paths.encode()}))
    assert {split: len(rows) for split, rows in labels(found).items()} == {"train": 5}
    assert found.unpacked["rows of labels.csv without an image"] == 1


def test_an_image_of_another_class_is_not_taken_for_one_that_is_lost(tmp_path):
    files = {"cat/1.jpg": image(1), "dog/3.jpg": image(3), "dog/4.jpg": image(4)}
    rows = b"path,label\ncat/1.jpg,cat\ncat/3.jpg,cat\ndog/4.jpg,dog\n"
    found = reading(tree(tmp_path / "src", files | {"labels.csv": rows}), reader="table")
    assert labels(found) == {"": {"cat/1.jpg": "cat", "dog/4.jpg": "dog"}}
    assert found.unpacked == {
        "rows of labels.csv without an image": 1,
        "images without a row in labels.csv": 1,
    }
    moved = rows.replace(b"cat/", b"/home/me/pictures/").replace(b"dog/", b"C:\\pictures\\")
    found = reading(tree(tmp_path / "moved", files | {"labels.csv": moved}), reader="table")
    assert len(labels(found)[""]) == 3


def test_an_image_in_two_splits_is_named(tmp_path):
    both = f"file_name,label,split\n{table(',train')}{table(',val', range(3))}"
    source = tree(tmp_path / "a", IMAGES | {"labels.csv": both.encode()})
    assert "0.jpg is in two splits in labels.csv, 'train' and 'val'" in refused(source)
    files = {f"images/{name}": data for name, data in IMAGES.items()}
    files |= {f"{split}.csv": f"file_name,label\n{table()}".encode() for split in ("train", "val")}
    assert "images/0.jpg is in two splits in train.csv, val.csv" in refused(tree(tmp_path / "b", files))
    partly = f"file_name,label,split\n{table(',train', range(3))}{table(',', range(3, 6))}"
    source = tree(tmp_path / "c", IMAGES | {"labels.csv": partly.encode()})
    assert "some images have a split, such as 'train', and some have none" in refused(source)
    twice = IMAGES | {"labels.csv": f"file_name,label\n{table()}{table()}".encode()}
    assert len(labels(reading(tree(tmp_path / "d", twice)))[""]) == 6


def test_a_split_none_of_whose_images_is_there_is_named(tmp_path):
    rows = f"file_name,label,split\n{table(',train')}x.jpg,cat,val\n"
    source = tree(tmp_path / "a", IMAGES | {"labels.csv": rows.encode()})
    assert "no image of split 'val' is there, so it would be missing" in refused(source)
    files = IMAGES | {"train.csv": f"id,label\n{table()}".encode(), "val.csv": b"id,label\nx.jpg,cat\n"}
    source = tree(tmp_path / "b", files)
    assert "its column id names no image here, such as 'x.jpg', so the split would" in refused(source)
    assert set(labels(reading(source, skip=["val.csv"]))) == {"train"}


def test_splits_of_one_word_are_the_same(tmp_path):
    files = {f"{split}/{i}.jpg": image(i) for split in ("train_images", "Validation") for i in range(3)}
    files |= {f"{split}.csv": f"id,label\n{table(rows=range(3))}".encode() for split in ("train", "val")}
    found = labels(reading(tree(tmp_path / "src", files)))
    assert {split: len(rows) for split, rows in found.items()} == {"train_images": 3, "validation": 3}


def test_numbers_of_classes_are_the_same_in_every_run():
    labels = ["01", "1", "001", "2", "02", "10"]
    orders = [sorted_classes(dict.fromkeys(labels[i:] + labels[:i])) for i in range(6)]
    assert all(order == ["1", "01", "001", "2", "02", "10"] for order in orders)
