"""Shard sets behind a URL."""

from __future__ import annotations

import hashlib
import logging
from contextlib import suppress
from pathlib import Path

from framework.data.shards.cache import CachedShards
from framework.data.shards.index import ShardSet
from framework.data.shards.scan import Sample, scan_shard
from framework.data.shards.shard_contents import ARRAYS, HEAD, Contents, parse_classes, tabulate
from framework.data.shards.store import Store
from framework.runtime.errors import UserError
from framework.runtime.files import sha256_of

logger = logging.getLogger(__name__)


def open_remote(url: str, cache: Path, limit: int) -> ShardSet:
    """The shards of a URL, read through a cache.

    A URL without index is indexed first, which reads every shard once; that index stays in the cache.

    Args:
        url: of the folder of the shards.
        cache: local folder; each URL has one of its own in it.
        limit: bytes that cached shards of this URL may take.

    Raises:
        UserError: as ``ShardSet.open``; no connection, no permission, a checksum that does not fit.
    """
    store = Store(url)
    folder = cache.expanduser() / hashlib.sha256(store.url.encode()).hexdigest()[:16]
    contents = _published(store) or _remembered(store, folder)
    if contents is None:
        contents = _build(store, folder, limit)
    files = CachedShards(store, folder, limit, contents.shards, contents.sha256)
    return ShardSet(files, contents)


def _published(store: Store) -> Contents | None:
    """The index beside the shards."""
    try:
        contents = Contents.parse(store.url, store.read(HEAD), store.read(ARRAYS))
    except FileNotFoundError:
        return None
    contents.check_unchanged(store.url, store.sizes(list(contents.shards)))
    return contents


def _remembered(store: Store, folder: Path) -> Contents | None:
    """The index of an earlier run, if the shards are still the same."""
    try:
        contents = Contents.parse(folder, (folder / HEAD).read_bytes(), (folder / ARRAYS).read_bytes())
    except FileNotFoundError:
        return None
    return contents if contents.shards == store.sizes() else None


def _build(store: Store, folder: Path, limit: int) -> Contents:
    shards = store.sizes()
    if not shards:
        raise UserError(f"{store.url}: holds no shards (*.tar), or the server lists none")
    classes = _classes(store)
    logger.warning("%s has no index: reading all %d shards once", store.url, len(shards))
    files = CachedShards(store, folder, limit, shards, sha256={})
    samples: dict[str, list[Sample]] = {}
    for name in shards:
        file = files.open(name)  # stays open, whatever becomes of its name
        path = Path(f"/proc/self/fd/{file.descriptor}")
        try:
            samples[name] = scan_shard(path)
        except UserError as error:
            raise UserError(str(error).replace(str(path), f"{store.url}/{name}")) from error
        files.learn(name, sha256_of(path))
    contents = Contents(shards, tabulate(store.url, samples, classes), classes, files.sha256)
    contents.save(folder)
    return contents


def _classes(store: Store) -> list[str] | None:
    for place in (store, Store(store.url.rpartition("/")[0])):
        with suppress(FileNotFoundError):
            return parse_classes(f"{place.url}/classes.json", place.read("classes.json"))
    return None
