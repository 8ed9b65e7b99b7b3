"""Files below a URL, read through fsspec however often the connection breaks."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from typing import Any, TypeVar

import fsspec

from framework.data.shards.shard_contents import INDEX
from framework.runtime.errors import UserError

_RANGE = 8 << 20  # bytes of one request: what a dropped connection costs
_TOGETHER = 8  # requests at a time
_ATTEMPTS = 8  # per request; the waits between them add up to some twenty seconds
_LONGEST_WAIT = 10.0  # seconds

T = TypeVar("T")


def is_url(path: str) -> bool:
    """Whether a path is a URL such as ``s3://bucket/folder``."""
    return "://" in path


class Store:
    """Reads below one URL: ``s3://``, ``gs://``, ``http(s)://`` and whatever else fsspec knows.

    Credentials come from where the service's own tools look for them (environment, ``~/.aws``); fsspec's
    environment variables (``FSSPEC_S3_ANON=true``) set the rest.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def exists(self) -> bool:
        """Whether there is an index or a listing to be had.

        Raises:
            UserError: no connection.
        """
        files, root = self._open()
        attempts = (
            lambda: files.cat_file(f"{root}/{INDEX.head}"),
            lambda: files.ls(root, detail=True, refresh=True),
        )
        for attempt in attempts:
            with suppress(FileNotFoundError):
                self._retried(self.url, attempt, missing=True)
                return True
        return False

    def sizes(self, names: list[str] | None = None) -> dict[str, int]:
        """Bytes of every shard (``*.tar``), in the order of names.

        Args:
            names: what to look for where a server has no listing (HTTP); ``None`` reads its index page.

        Raises:
            UserError: no such folder or shard, no permission, no connection.
        """
        files, root = self._open()
        http = "http" in files.protocol
        if http and names is not None:
            paths = [f"{root}/{name}" for name in names]
            return dict(zip(names, self._retried(self.url, lambda: files.sizes(paths)), strict=True))
        found = self._retried(self.url, lambda: files.ls(root, detail=True, refresh=True))
        sizes = {entry["name"].rpartition("/")[2]: entry["size"] for entry in found}
        sizes = {name: sizes[name] for name in sorted(sizes) if name.endswith(".tar")}
        return self.sizes(list(sizes)) if http and sizes else sizes

    def read(self, name: str) -> bytes:
        """A whole, small file.

        Raises:
            FileNotFoundError: there is none, or none for us.
            UserError: as ``sizes``.
        """
        files, root = self._open()
        return bytes(
            self._retried(f"{self.url}/{name}", lambda: files.cat_file(f"{root}/{name}"), missing=True)
        )

    def parts(self, name: str, size: int) -> Iterator[bytes]:
        """A file of ``size`` bytes in consecutive parts, several fetched at a time.

        Raises:
            UserError: as ``sizes``; the file is shorter; the server cannot send parts.
        """
        spans = [(start, min(start + _RANGE, size)) for start in range(0, size, _RANGE)]
        for first in range(0, len(spans), _TOGETHER):
            together = spans[first : first + _TOGETHER]
            fetched: dict[tuple[int, int], bytes] = {}
            self._retried(f"{self.url}/{name}", partial(self._fetch, name, together, fetched))
            yield from (fetched[span] for span in together)

    def _fetch(self, name: str, spans: list[tuple[int, int]], fetched: dict[tuple[int, int], bytes]) -> None:
        """Fetch what is missing; raises the first failure when all have come or failed."""
        files, root = self._open()
        missing = [span for span in spans if span not in fetched]
        starts, ends = zip(*missing, strict=True)
        replies = files.cat_ranges([f"{root}/{name}"] * len(missing), list(starts), list(ends))
        failures: list[Exception] = []
        for (start, end), reply in zip(missing, replies, strict=True):
            if isinstance(reply, Exception):
                failures.append(reply)
            elif len(reply) > end - start:
                raise UserError(f"{self.url}/{name}: the server does not send parts of files (HTTP ranges)")
            elif len(reply) < end - start:
                failures.append(OSError(f"{len(reply)} bytes instead of {end - start}"))
            else:
                fetched[start, end] = bytes(reply)
        if failures:
            raise failures[0]

    def _open(self) -> tuple[Any, str]:
        """fsspec's file system and the path in it; fsspec keeps one per process and thread."""
        protocol = self.url.partition("://")[0]
        try:
            files, root = fsspec.url_to_fs(self.url)
        except ImportError as error:
            extra = f"stagewise[{protocol}]"
            raise UserError(f"{self.url}: {error}; install {extra}") from error
        except ValueError as error:
            raise UserError(f"{self.url}: {error}; use a folder, s3://, gs:// or http(s)://") from error
        return files, root

    def _retried(self, what: str, call: Callable[[], T], missing: bool = False) -> T:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return call()
            except UserError:
                raise
            except Exception as error:  # each library below fsspec has its own for a lost connection
                if missing and _is_absent(error):
                    raise FileNotFoundError(str(error)) from error
                if isinstance(error, FileNotFoundError):
                    raise UserError(f"{what}: not found ({error})") from error
                if isinstance(error, PermissionError):
                    raise UserError(f"{what}: no permission ({error})") from error
                if attempt == _ATTEMPTS:
                    reason = f"{type(error).__name__}: {error}"
                    raise UserError.as_transient(
                        f"{what}: cannot be read, {attempt} times in a row ({reason})"
                    ) from error
                time.sleep(min(_LONGEST_WAIT, 0.1 * 2**attempt) * random.uniform(0.5, 1))
        raise AssertionError


def _is_absent(error: Exception) -> bool:
    """Answers 404 and 403; who may not list gets the latter from S3 for what is not there."""
    return (
        isinstance(error, FileNotFoundError | PermissionError)
        or getattr(error, "status", None) == HTTPStatus.FORBIDDEN
    )
