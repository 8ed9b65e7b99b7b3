"""The data sets of torchvision, made here in small, as they lie around."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets
from scipy.io import savemat

from framework.data.loading.decode import decode
from framework.runtime.errors import UserError
from tests.support.packing import packed


def registered(monkeypatch, kind: type, lists: dict[str, list[str]], folder: Path, meta: str = "") -> None:
    """Give a data set of torchvision the checksums of the files made here."""

    def md5(name: str) -> str:
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    for field, names in lists.items():
        monkeypatch.setattr(kind, field, [[name, md5(name)] for name in names])
    if meta:
        monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(meta)})


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar(tmp_path, monkeypatch, classes):
    kind = torchvision.datasets.CIFAR10 if classes == 10 else torchvision.datasets.CIFAR100
    folder = tmp_path / "src" / kind.base_folder
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3072), np.uint8)
    labels = {"labels" if classes == 10 else "fine_labels": [0, 1, 2, 3, 4, 5]}
    for name in ("train", "test"):
        (folder / name).write_bytes(pickle.dumps({"data": pixels, **labels}))
    names = [f"class {i}" for i in range(classes)]
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: names}))
    lists = {"train_list": ["train"], "test_list": ["test"]}
    registered(monkeypatch, kind, lists, folder, kind.meta["filename"])
    found = packed(tmp_path / "src", tmp_path / "out")
    assert set(found) == {"train", "test"}
    assert found["test"].classes == names
    for i in range(6):
        expected = pixels[found["train"].labels[i]].reshape(3, 32, 32)
        assert np.array_equal(decode(found["train"].read(i)), expected)
    monkeypatch.setattr(kind, "train_list", [["train", "0" * 32]])
    with pytest.raises(UserError, match="not found or corrupted"):
        packed(tmp_path / "src", tmp_path / "again")


def test_stl10(tmp_path, monkeypatch):
    kind = torchvision.datasets.STL10
    folder = tmp_path / "src" / kind.base_folder
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 96, 96), np.uint8)
    for name in ("train", "test", "unlabeled"):
        (folder / f"{name}_X.bin").write_bytes(pixels.tobytes())
    for name in ("train", "test"):
        (folder / f"{name}_y.bin").write_bytes(bytes([1, 2, 3, 10]))
    (folder / "class_names.txt").write_text("\n".join(f"class {i}" for i in range(10)))
    lists = {
        "train_list": ["train_X.bin", "train_y.bin", "unlabeled_X.bin"],
        "test_list": ["test_X.bin", "test_y.bin"],
    }
    registered(monkeypatch, kind, lists, folder)
    found = packed(tmp_path / "src", tmp_path / "out")
    assert not found["unlabeled"].labeled
    assert sorted(found["train"].labels) == [0, 1, 2, 9]
    row = {0: 0, 1: 1, 2: 2, 9: 3}[int(found["train"].labels[0])]
    assert np.array_equal(decode(found["train"].read(0)), pixels[row].transpose(0, 2, 1))  # stored by column


def test_svhn(tmp_path, monkeypatch):
    kind = torchvision.datasets.SVHN
    (tmp_path / "src").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 4), np.uint8)
    for name in ("train", "test"):
        savemat(tmp_path / "src" / f"{name}_32x32.mat", {"X": pixels, "y": np.array([[1], [5], [9], [10]])})
    digest = {
        name: hashlib.md5((tmp_path / "src" / f"{name}_32x32.mat").read_bytes()).hexdigest()
        for name in ("train", "test")
    }
    monkeypatch.setattr(
        kind, "split_list", {n: [*kind.split_list[n][:2], digest[n]] for n in ("train", "test")}
    )
    found = packed(tmp_path / "src", tmp_path / "out")
    assert sorted(found["test"].labels) == [0, 1, 5, 9]  # the digit 0 is stored as 10
    row = {1: 0, 5: 1, 9: 2, 0: 3}[int(found["test"].labels[0])]
    assert np.array_equal(decode(found["test"].read(0)).permute(1, 2, 0), pixels[..., row])
