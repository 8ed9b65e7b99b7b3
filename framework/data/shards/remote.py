"""Shard sets behind a URL."""

from __future__ import annotations

import hashlib
import logging
from contextlib import suppress
from pathlib import Path

from framework.data.shards.cache import CachedShards
from framework.data.shards.index import ShardSet
from framework.data.shards.naming import check_one_series, matching
from framework.data.shards.scan import ShardScan, scan_shard
from framework.data.shards.shard_contents import (
    INDEX,
    Contents,
    IndexFiles,
    index_of,
    is_foreign,
    parse_classes,
    tabulate,
)
from framework.data.shards.store import Store
from framework.runtime.errors import UserError
from framework.runtime.files import sha256_of

logger = logging.getLogger(__name__)


def open_remote(url: str, cache: Path, limit: int, pattern: str | None = None) -> ShardSet:
    """The shards of a URL, read through a cache.

    A URL without index is indexed first, which reads every shard once; that index stays in the cache.

    Args:
        url: of the folder of the shards.
        cache: local folder; each URL has one of its own in it.
        limit: bytes that cached shards of this URL may take.
        pattern: which of the shards, see ``naming.matching``; ``None`` for all, which must be one series.

    Raises:
        UserError: as ``ShardSet.open``; no connection, no permission, a checksum that does not fit.
    """
    store = Store(url)
    folder = cache.expanduser() / hashlib.sha256(store.url.encode()).hexdigest()[:16]
    contents = _published(store, pattern) or _remembered(store, folder, pattern)
    if contents is None:
        contents = _build(store, folder, limit, pattern)
    files = CachedShards(store, folder, limit, contents.shards, contents.sha256)
    return ShardSet(files, contents)


def _published(store: Store, pattern: str | None) -> Contents | None:
    """The index beside the shards, if it is ours and has them."""
    try:
        head = store.read(INDEX.head)
        if is_foreign(head):
            return None
        contents = Contents.parse(store.url, head, store.read(INDEX.arrays))
    except FileNotFoundError:
        return None
    if pattern is None:
        check_one_series(store.url, contents.shards)
    else:
        contents = contents.only(matching(store.url, contents.shards, pattern))
    contents.check_unchanged(store.url, store.sizes(list(contents.shards)))
    return contents


def _remembered(store: Store, folder: Path, pattern: str | None) -> Contents | None:
    """The index of an earlier run, if the shards are still the same."""
    files = _cached_index(pattern)
    try:
        head, arrays = (folder / files.head).read_bytes(), (folder / files.arrays).read_bytes()
        contents = Contents.parse(folder, head, arrays, files)
    except FileNotFoundError:
        return None
    return contents if contents.shards == _chosen(store, pattern) else None


def _cached_index(pattern: str | None) -> IndexFiles:
    return INDEX if pattern is None else index_of(pattern)


def _chosen(store: Store, pattern: str | None) -> dict[str, int]:
    """Sizes of the shards to read, by name."""
    sizes = store.sizes()
    if pattern is not None:
        return {name: sizes[name] for name in matching(store.url, sizes, pattern)}
    check_one_series(store.url, sizes)
    return sizes


def _build(store: Store, folder: Path, limit: int, pattern: str | None) -> Contents:
    shards = _chosen(store, pattern)
    if not shards:
        raise UserError(f"{store.url}: holds no shards (*.tar), or the server lists none")
    classes = _classes(store)
    logger.warning("%s has no index: reading all %d shards once", store.url, len(shards))
    files = CachedShards(store, folder, limit, shards, sha256={})
    scans: dict[str, ShardScan] = {}
    for name in shards:
        file = files.open(name)  # stays open, whatever becomes of its name
        path = Path(f"/proc/self/fd/{file.descriptor}")
        try:
            scans[name] = scan_shard(path)
        except UserError as error:
            raise UserError(str(error).replace(str(path), f"{store.url}/{name}")) from error
        files.learn(name, sha256_of(path))
    contents = tabulate(store.url, shards, scans, classes)._replace(sha256=files.sha256)
    contents.save(folder, _cached_index(pattern))
    return contents


def _classes(store: Store) -> list[str] | None:
    for place in (store, Store(store.url.rpartition("/")[0])):
        with suppress(FileNotFoundError):
            return parse_classes(f"{place.url}/classes.json", place.read("classes.json"))
    return None
