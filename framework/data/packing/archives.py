"""Tar and zip archives as places: where every file lies in them, without unpacking them to the disk's folders."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import posixpath
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from framework.data.packing.place import Listing, Place, is_hidden
from framework.data.shards.scan import PARSE_ERRORS, check_end, members
from framework.runtime.errors import UserError

Extents = dict[str, tuple[int, int]]  # offset and size of every file

# By how a file begins.
_ZIP = b"PK"
_OPENERS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
_UNKNOWN = {b"\x28\xb5\x2f\xfd": "zstd", b"Rar!": "unrar", b"7z\xbc\xaf": "7z"}
_BROKEN = (
    OSError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    NotImplementedError,
    *PARSE_ERRORS,
)


def open_archive(path: Path, work: Path, skip: Sequence[str] = ()) -> Place:
    """The place that an archive is.

    Args:
        path: a tar, perhaps compressed by gzip, bzip2 or xz, or a zip.
        work: an existing folder with room for what a compressed archive holds (nothing is left in it).
        skip: globs of paths to leave out.

    Raises:
        UserError: it is neither, or damaged.
    """
    try:
        file, extents, links, listing = _opened(path, work)
    except _BROKEN as error:
        raise UserError(f"{path}: not a whole tar, tar.gz or zip ({error})") from error
    except RuntimeError as error:  # of zipfile, for one that is encrypted
        raise UserError(f"{path}: cannot be read: {error}") from error
    _follow(links, extents, listing)
    listing.files.extend(name for name in extents if not _hidden(name, listing.ignored))
    listing.folders.difference_update([name for name in listing.folders if _is_hidden(name)])
    for name in listing.files:
        while name := posixpath.dirname(name):
            if name in listing.folders:
                break
            listing.folders.add(name)
    return Place(path, listing, _ArchiveBytes(file, extents), skip)


def tar_files(path: Path, file: BinaryIO) -> tuple[Extents, dict[str, str], Listing]:
    """Where the files of a tar lie, the targets of its links, and what else is in it.

    Raises:
        UserError: damaged.
        OSError, tarfile.TarError, ValueError ...: ``PARSE_ERRORS``.
    """
    extents, links, listing = Extents(), dict[str, str](), Listing([], set(), Counter(), set())
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in members(path, tar):
            name = posixpath.normpath(member.name).lstrip("/")
            if member.isdir():
                listing.folders.update({name} - {"."})
            elif member.issym():
                links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
            elif member.islnk():
                links[name] = posixpath.normpath(member.linkname).lstrip("/")
            elif member.issparse() or not member.isreg():
                listing.ignored["sparse file" if member.issparse() else "not a file"] += 1
            else:
                extents[name] = (member.offset_data, member.size)
                links.pop(name, None)
        check_end(path, file, tar.offset)
    return extents, links, listing


def _opened(path: Path, work: Path) -> tuple[BinaryIO, Extents, dict[str, str], Listing]:
    file: BinaryIO = open(path, "rb")  # noqa: SIM115  # read as long as the place is used
    start = file.read(6)
    file.seek(0)
    if start.startswith(_ZIP):
        return _unzipped(file, work)
    for mark, tool in _UNKNOWN.items():
        if start.startswith(mark):
            raise UserError(
                f"{path}: unpack it ({tool}) and name the folder; tar, gzip, bzip2, xz and zip are read"
            )
    for mark, opener in _OPENERS.items():
        if start.startswith(mark):
            file.close()
            file = _unnamed(work)
            with opener(path) as packed:
                shutil.copyfileobj(packed, file, 1 << 20)
            file.seek(0)
            break
    return file, *tar_files(path, file)


def _unnamed(work: Path) -> BinaryIO:
    """A file of which even a kill leaves nothing."""
    return cast(BinaryIO, tempfile.TemporaryFile(dir=work))


def _unzipped(file: BinaryIO, work: Path) -> tuple[BinaryIO, Extents, dict[str, str], Listing]:
    """The files of a zip one behind the other, in an unnamed file."""
    unpacked = _unnamed(work)
    extents, links, listing = Extents(), dict[str, str](), Listing([], set(), Counter(), set())
    with file, zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            name = posixpath.normpath(entry.filename).lstrip("/")
            if entry.is_dir():
                listing.folders.update({name} - {"."})
                continue
            if stat.S_ISLNK(entry.external_attr >> 16):
                target = archive.read(entry).decode("utf-8", "surrogateescape")
                links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
                continue
            with archive.open(entry) as member:
                shutil.copyfileobj(member, unpacked, 1 << 20)
            extents[name] = (unpacked.tell() - entry.file_size, entry.file_size)
    unpacked.flush()
    return unpacked, extents, links, listing


def _follow(links: dict[str, str], extents: Extents, listing: Listing) -> None:
    """Give links the bytes of the files that they lead to; those to folders, of all files below."""
    for name, target in links.items():
        for _ in range(len(links)):  # a longer chain is a circle
            if target not in links:
                break
            target = links[target]
        if target in extents:
            extents[name] = extents[target]
        elif below := [other for other in extents if other.startswith(f"{target}/")]:
            extents |= {name + other[len(target) :]: extents[other] for other in below}
        else:
            listing.ignored["link that leads nowhere"] += 1
            listing.lost.add(name)


def _is_hidden(name: str) -> bool:
    return any(map(is_hidden, name.split("/")))


def _hidden(name: str, ignored: Counter[str]) -> bool:
    """Whether a file is passed over; counts it then."""
    if hidden := _is_hidden(name):
        ignored["hidden"] += 1
    return hidden


class _ArchiveBytes:
    """The files of an archive by their extents."""

    def __init__(self, file: BinaryIO, extents: Extents) -> None:
        self.file, self.extents = file, extents

    def pread(self, name: str, offset: int, length: int) -> bytes:
        start, size = self.extents[name]
        return os.pread(self.file.fileno(), max(0, min(length, size - offset)), start + offset)

    def size(self, name: str) -> int:
        return self.extents[name][1]
