"""The splits of a recipe: what their labels mean, and which of them are there."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_data_loader import gray_png

from framework.config.recipe import Data, Recipe
from framework.data.packing.writer import write_shards
from framework.data.split_paths import check_train_folder
from framework.data.splits import Splits
from framework.runtime.errors import UserError
from tests.support.http_store import serve


def write(folder: Path, classes: list[str] | None) -> None:
    write_shards(((f"{i}", gray_png(i), "png", i % 2) for i in range(4)), folder, classes)


def opened(path: Path | str, **data: object) -> Splits:
    return Splits.open(Recipe(name="test", data=Data(path=str(path), **data)))


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["bee", "cat"], "label 0 is ant in .*train and bee in .*test; pack both"),
        (["ant", "bee"], "label 2 is cat in .*train and no class in .*test"),
        (["ant", "bee", "cat", "dog"], "label 3 is no class in .*train and dog in .*test"),
    ],
)
def test_a_label_means_one_class(tmp_path, names, problem):
    write(tmp_path / "train", ["ant", "bee", "cat"])
    write(tmp_path / "test", names)
    with pytest.raises(UserError, match=problem):
        opened(tmp_path)


@pytest.mark.parametrize("names", [["ant", "bee", "cat"], None])
def test_a_split_may_name_the_same_classes_or_none(tmp_path, names):
    write(tmp_path / "train", ["ant", "bee", "cat"])
    write(tmp_path / "test", names)
    assert opened(tmp_path).num_classes == 3


def test_a_url_may_have_no_test_split(tmp_path, caplog):
    write(tmp_path / "www" / "train", None)
    cache = str(tmp_path / "cache")
    with serve(tmp_path / "www") as server:
        splits = opened(server.url, cache_dir=cache)
        assert splits.test is None
        assert f"{server.url}/test: no such folder, so nothing will be scored" in caplog.text
        with pytest.raises(UserError, match="/test: no such folder; images to score on"):
            _ = splits.held_out
        with pytest.raises(UserError, match="/none: not found"):
            opened(server.url, cache_dir=cache, train="none")
        write(tmp_path / "www" / "val", None)
        assert str(opened(server.url, cache_dir=cache).held_out.folder) == f"{server.url}/val"
        (tmp_path / "www" / "test").mkdir()
        with pytest.raises(UserError, match="/test: holds no shards"):
            opened(server.url, cache_dir=cache)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_server_that_fails_is_no_missing_split(tmp_path, monkeypatch, indexed):
    monkeypatch.setattr("framework.data.shards.store._LONGEST_WAIT", 0.0)
    for split in ("train", "test"):
        write(tmp_path / "www" / split, None)
    if not indexed:
        (tmp_path / "www" / "test" / "index.json").unlink()
    with serve(tmp_path / "www") as server:
        assert len(opened(server.url, cache_dir=str(tmp_path / "cache")).held_out) == 4
        server.statuses["test"] = 403  # of S3 to who may not list
        assert opened(server.url, cache_dir=str(tmp_path / "cache")).test is None
        server.statuses["test"] = 503
        with pytest.raises(UserError, match=r"/test: cannot be read, 8 times in a row .*503") as caught:
            opened(server.url, cache_dir=str(tmp_path / "cache"))
    assert caught.value.transient


@pytest.mark.parametrize("prepare", ["digits", "none"])
@pytest.mark.parametrize("key", ["path", "cache_dir"])
@pytest.mark.parametrize("value", ["", " "])
def test_a_folder_without_a_name_is_one_line_and_nothing_is_written(
    tmp_path, monkeypatch, key, value, prepare
):
    """As an unset variable of a shell gives it."""
    monkeypatch.chdir(tmp_path)
    data = {"path": "http://127.0.0.1:1", "prepare": prepare} | {key: value}
    with pytest.raises(UserError, match=f"data.{key}: is empty, and must name a folder") as error:
        opened(**data)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=f"data.{key}: is empty"):
        check_train_folder(Data(**data))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("prepare", ["digits", "none"])
@pytest.mark.parametrize(
    "data", [{"path": "o" * 300}, {"path": "a\0b"}, {"path": ".", "train": "o" * 300}, {"path": ".", "test": "a\0"}]
)  # fmt: skip
def test_a_folder_that_cannot_be_is_one_line(tmp_path, monkeypatch, data, prepare):
    monkeypatch.chdir(tmp_path)
    for check in (
        lambda: check_train_folder(Data(prepare=prepare, **data)),
        lambda: opened(prepare=prepare, **data),
    ):
        with pytest.raises(UserError, match=r"cannot be a folder: .*(name too long|null)"):
            check()
    assert list(tmp_path.iterdir()) == []
