"""Shards behind a URL: a web server on loopback that drops connections, and a bounded cache."""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from framework.config.recipe import Data, Recipe, Train
from framework.data.loading.loader import EvalLoader
from framework.data.shards.index import ShardSet
from framework.data.shards.remote import open_remote
from framework.data.splits import Splits
from framework.runtime.errors import UserError
from tests.support.forked import Forked
from tests.support.http_store import serve
from tests.support.remote import GB, PLAIN, cached, train_loader, write
from tests.support.waiting import until


@pytest.fixture
def local(tmp_path) -> ShardSet:
    return write(tmp_path / "www" / "train")


def test_a_server_that_drops_connections_gives_every_byte(tmp_path, local, monkeypatch):
    monkeypatch.setattr("framework.data.shards.store._RANGE", 7000)  # several parts to a shard
    with serve(tmp_path / "www", drops=1) as server:
        shards = open_remote(f"{server.url}/train", tmp_path / "cache", GB)
        assert [shards.read(i) for i in range(24)] == [local.read(i) for i in range(24)]
        first = server.seen["GET /train/shard-000000.tar"]
        assert first == 2 * -(-local.shards["shard-000000.tar"] // 7000)
        assert shards.read(0) == local.read(0)
        assert server.seen["GET /train/shard-000000.tar"] == first
    assert (shards.labels == local.labels).all()
    assert shards.classes == local.classes
    again = pickle.loads(pickle.dumps(shards))  # the server is gone, the cache is not
    assert again.read(5) == local.read(5)


def test_a_connection_that_never_holds_is_given_up(tmp_path, local, monkeypatch):
    monkeypatch.setattr("framework.data.shards.store._LONGEST_WAIT", 0.0)
    with serve(tmp_path / "www") as server:
        shards = open_remote(f"{server.url}/train", tmp_path / "cache", GB)
        server.drops = 1000
        with pytest.raises(UserError, match=r"shard-000000\.tar: cannot be read, 8 times in a row"):
            shards.read(0)
    assert cached(tmp_path / "cache") == []


def test_checksums_are_checked(tmp_path, local):
    with serve(tmp_path / "www", spoiled={"shard-000001.tar"}) as server:
        shards = open_remote(f"{server.url}/train", tmp_path / "cache", GB)
        assert shards.read(0) == local.read(0)
        with pytest.raises(UserError, match=r"shard-000001\.tar: arrived 3 times with another checksum"):
            shards.read(4)
    assert [path.name[17:] for path in cached(tmp_path / "cache")] == ["shard-000000.tar"]


def test_the_cache_is_bounded_and_drops_the_longest_unused(tmp_path, local):
    size = max(local.shards.values())
    with serve(tmp_path / "www") as server:
        shards = open_remote(f"{server.url}/train", tmp_path / "cache", 2 * size + 1000)
        for sample in (0, 4, 0, 8):
            assert shards.read(sample) == local.read(sample)
            time.sleep(0.01)
        kept = {path.name[17:] for path in cached(tmp_path / "cache")}
        assert kept == {"shard-000000.tar", "shard-000002.tar"}
        for sample in range(24):
            shards.read(sample)
            assert sum(path.stat().st_size for path in cached(tmp_path / "cache")) <= 2 * size + 1000
        with pytest.raises(UserError, match="alone has"):
            open_remote(f"{server.url}/train", tmp_path / "cache", size - 1000)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_equal_those_of_the_local_folder(tmp_path, local, workers):
    limit = 5 * max(local.shards.values())
    with serve(tmp_path / "www", drops=1) as server:
        shards = open_remote(f"{server.url}/train", tmp_path / "cache", limit)
        found = list(train_loader(shards, workers=workers).steps(2, 9))
        expected = list(train_loader(local).steps(2, 9))
        for (batch,), (other,) in zip(found, expected, strict=True):
            assert torch.equal(batch.images, other.images)
            assert torch.equal(batch.labels, other.labels)
        settings = {"image_size": 8, "batch_size": 5, "rank": 0, "world_size": 1, "device": "cpu"}
        for one, other in zip(
            EvalLoader(shards, PLAIN, workers=workers, **settings),
            EvalLoader(local, PLAIN, workers=0, **settings),
            strict=True,
        ):
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[1], other[1])
    assert sum(path.stat().st_size for path in cached(tmp_path / "cache")) <= limit


def test_each_shard_is_fetched_once_an_epoch(tmp_path, local):
    limit = 6 * max(local.shards.values())
    with serve(tmp_path / "www") as server:
        shards = open_remote(f"{server.url}/train", tmp_path / "cache", limit)
        list(train_loader(shards, workers=2).steps(0, 6))
        assert [server.seen[f"GET /train/{name}"] for name in shards.shards] == [1] * 6


def test_shards_of_others_are_indexed_into_the_cache(tmp_path, local):
    (local.folder / "index.json").unlink()
    with serve(tmp_path / "www") as server:
        for _ in range(2):
            shards = open_remote(f"{server.url}/train", tmp_path / "cache", GB)
            assert [shards.read(i) for i in range(24)] == [local.read(i) for i in range(24)]
            assert shards.classes == ["a", "b", "c"]
        assert server.seen["GET /train/shard-000003.tar"] == 1
        assert shards.contents.sha256 == local.contents.sha256
        shutil.copy(local.folder / "shard-000000.tar", local.folder / "shard-000006.tar")
        assert len(open_remote(f"{server.url}/train", tmp_path / "cache", GB)) == 28


def test_what_is_missing_is_named(tmp_path, local):
    with serve(tmp_path / "www") as server:
        with pytest.raises(UserError, match="none: not found"):
            open_remote(f"{server.url}/none", tmp_path / "cache", GB)
        (tmp_path / "www" / "empty").mkdir()
        with pytest.raises(UserError, match="empty: holds no shards"):
            open_remote(f"{server.url}/empty", tmp_path / "cache", GB)
        (local.folder / "shard-000003.tar").rename(tmp_path / "kept")
        with pytest.raises(UserError, match=r"not found .*shard-000003\.tar"):
            open_remote(f"{server.url}/train", tmp_path / "cache", GB)
        (local.folder / "shard-000003.tar").write_bytes(b"short")
        with pytest.raises(UserError, match=r"shard-000003\.tar: has 5 bytes and had"):
            open_remote(f"{server.url}/train", tmp_path / "cache", GB)
        (local.folder / "index.json").write_bytes(b"{")
        with pytest.raises(UserError, match=r"index\.json: damaged"):
            open_remote(f"{server.url}/train", tmp_path / "cache", GB)
        (local.folder / "index.json").unlink()
        with pytest.raises(UserError, match=r"train/shard-000003\.tar: not a whole tar file"):
            open_remote(f"{server.url}/train", tmp_path / "cache", GB)


def test_a_server_without_ranges_is_refused(tmp_path, local, monkeypatch):
    monkeypatch.setattr("framework.data.shards.store._RANGE", 7000)
    with serve(tmp_path / "www", ranges=False) as server:
        shards = open_remote(f"{server.url}/train", tmp_path / "cache", GB)
        with pytest.raises(UserError, match="does not send parts of files"):
            shards.read(0)


def test_unusable_urls_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere://x"):
        open_remote("nowhere://x/y", tmp_path, GB)


def test_a_full_or_foreign_disk_is_named(tmp_path, local):
    with serve(tmp_path / "www") as server, pytest.raises(UserError, match=r"data\.cache_dir"):
        (tmp_path / "file").write_text("")
        open_remote(f"{server.url}/train", tmp_path / "file", GB)


def recipe(**data: object) -> Recipe:
    return Recipe(
        name="test", data=Data(image_size=8, workers=0, **data), views=PLAIN, train=Train(batch_size=4)
    )


def test_recipes_name_urls(tmp_path, local):
    shutil.copytree(local.folder, tmp_path / "www" / "test")
    with serve(tmp_path / "www") as server:
        remote = {"path": server.url, "cache_dir": str(tmp_path / "cache")}
        splits = Splits.open(recipe(**remote, window=6))
        assert (splits.num_classes, len(splits.test)) == (3, 24)
        found = [batch.images for (batch,) in splits.train_loader(1).steps(0, 6)]
        expected = [batch.images for (batch,) in train_loader(local).steps(0, 6)]
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        small = 3 * max(local.shards.values()) / 1e9
        with pytest.raises(UserError, match=r"data\.cache_gb=.*set a smaller data\.window above 0"):
            Splits.open(recipe(**remote, cache_gb=small))
        with pytest.raises(UserError, match="packed into a local folder"):
            Splits.open(recipe(**remote, prepare="digits"))


def test_recipes_keep_images_in_memory(tmp_path, local):
    shutil.copytree(local.folder, tmp_path / "www" / "test")
    views = dataclasses.replace(PLAIN, kind="supervised")
    kept, read = (
        dataclasses.replace(recipe(path=str(tmp_path / "www"), cache=cache), views=views)
        for cache in ("memory", "none")
    )
    in_memory = Splits.open(kept).train_loader(2)
    ((expected,),) = Splits.open(read).train_loader(2).steps(0, 1)
    shutil.rmtree(tmp_path / "www")
    ((found,),) = in_memory.steps(0, 1)
    assert found.images.shape == (8, 3, 8, 8)
    assert torch.equal(found.labels, expected.labels)
    difference = (255 * (found.images - expected.images)).abs().round()
    assert difference.max() <= 2


def indexed_folders(settings: Recipe) -> int:
    """How many folders this rank had to index."""
    messages: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = messages.append
    log = logging.getLogger("framework.data.shards.index")
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    Splits.open(settings)
    log.removeHandler(handler)
    return len(messages)


def test_the_main_rank_indexes_before_the_others(tmp_path, local, pool):
    shutil.copytree(local.folder, tmp_path / "www" / "test")
    for folder in (tmp_path / "www").iterdir():
        (folder / "index.json").unlink()
    assert pool(2).run(indexed_folders, recipe(path=str(tmp_path / "www"))) == [2, 0]


def load_for_ever(url: str, cache: Path) -> None:
    shards = open_remote(url, cache, GB)
    for step, _ in enumerate(train_loader(shards, workers=2, window=0).steps(0, 10**6)):
        print(step, flush=True)


@pytest.mark.slow
@pytest.mark.usefixtures("pool")  # its server forks the process
def test_nothing_is_left_after_a_kill(tmp_path, local):
    def shared_memory() -> set[str]:
        """Without that of other processes, which live."""
        owners = {name: re.fullmatch(r"torch_(\d+)_.*", name) for name in os.listdir("/dev/shm")}
        return {name for name, owner in owners.items() if owner is None or not alive(int(owner[1]))}

    before = shared_memory()
    with serve(tmp_path / "www") as server:
        with Forked(tmp_path / "run", load_for_ever, f"{server.url}/train", tmp_path / "cache") as run:
            until(lambda: "3\n" in run.stdout or not run.process.is_alive())
            workers = children(run.pid)
            assert len(workers) == 2
            run.signal(signal.SIGKILL)
        until(lambda: not any(alive(pid) for pid in workers))
        until(lambda: shared_memory() <= before)
    kept = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    pattern = re.compile(r"[0-9a-f]{16}-shard-\d{6}\.tar|lock")
    assert kept
    assert all(pattern.fullmatch(name) for name in kept)
    for path in cached(tmp_path / "cache"):
        assert path.stat().st_size == local.shards[path.name[17:]]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
