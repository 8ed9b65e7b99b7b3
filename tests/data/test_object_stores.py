"""Shards in object stores on loopback that drop connections."""

from __future__ import annotations

import pytest

from framework.data.shards.index import ShardSet
from framework.data.shards.remote import open_remote
from framework.data.shards.store import Store
from framework.runtime.errors import UserError
from tests.support.http_store import breaking
from tests.support.remote import GB, write


@pytest.fixture
def local(tmp_path) -> ShardSet:
    return write(tmp_path / "www" / "train")


@pytest.fixture
def s3(monkeypatch):
    """An empty bucket ``bucket`` in an object store on loopback: (its client, the door to it)."""
    moto = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    with breaking(*server.get_host_and_port()) as door:
        monkeypatch.setenv("AWS_ENDPOINT_URL", door.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        yield client, door
    server.stop()


def test_s3_that_drops_connections(tmp_path, local, s3, monkeypatch):
    monkeypatch.setattr("framework.data.shards.store._RANGE", 7000)
    client, door = s3
    for path in local.folder.iterdir():
        client.upload_file(str(path), "bucket", f"sets/train/{path.name}")
    url = "s3://bucket/sets/train"
    shards = open_remote(url, tmp_path / "cache", GB)
    door.breaks = 5
    assert [shards.read(i) for i in range(24)] == [local.read(i) for i in range(24)]
    assert door.broken == 5
    assert Store(url).sizes() == local.shards
    assert Store(url).exists()
    assert not Store("s3://bucket/none").exists()
    client.delete_object(Bucket="bucket", Key="sets/train/shard-000002.tar")
    with pytest.raises(UserError, match=r"s3://bucket/sets/train/shard-000002\.tar: missing, though indexed"):
        open_remote(url, tmp_path / "cache", GB)
    with pytest.raises(UserError, match="s3://bucket/none: not found"):
        open_remote("s3://bucket/none", tmp_path / "cache", GB)


@pytest.fixture
def gs(tmp_path, monkeypatch):
    """An empty bucket ``bucket`` in Google's kind of object store on loopback: (its file system, the door to it)."""
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    gcsfs = pytest.importorskip("gcsfs")
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    with breaking("127.0.0.1", server._api._httpd.server_port) as door:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", door.url)
        gcsfs.GCSFileSystem.clear_instance_cache()
        yield gcsfs.GCSFileSystem(), door
    gcsfs.GCSFileSystem.clear_instance_cache()
    server.stop()


@pytest.mark.slow
def test_gs_that_drops_connections(tmp_path, local, gs, monkeypatch):
    monkeypatch.setattr("framework.data.shards.store._RANGE", 7000)
    files, door = gs
    for path in local.folder.iterdir():
        files.pipe(f"bucket/sets/train/{path.name}", path.read_bytes())
    shards = open_remote("gs://bucket/sets/train", tmp_path / "cache", GB)
    door.breaks = 5
    assert [shards.read(i) for i in range(24)] == [local.read(i) for i in range(24)]
    assert door.broken == 5
    assert Store("gs://bucket/sets/train").exists()
    assert not Store("gs://bucket/none").exists()
    with pytest.raises(UserError, match="gs://bucket/none: not found"):
        open_remote("gs://bucket/none", tmp_path / "cache", GB)
