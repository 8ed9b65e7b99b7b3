"""What lies in a folder or an archive: its files by path, whichever of the two it is."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

from framework.data.shards.folder import Folder
from framework.data.shards.image_types import HEAD_BYTES, SUFFIXES, begins_like_an_image, suffix
from framework.runtime.errors import UserError

# Folders that operating systems and file servers leave; so do names with a dot in front.
_LITTER = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found", "System Volume Information"}


class Bytes(Protocol):
    """Reads the files of a place; usable from forked processes."""

    def pread(self, name: str, offset: int, length: int) -> bytes:
        """``length`` bytes of a file from ``offset`` on, fewer at its end."""
        ...

    def size(self, name: str) -> int:
        """Bytes of a file."""
        ...


class Listing(NamedTuple):
    """Paths below a place.

    Attributes:
        files: of everything that can be read and is not hidden.
        folders: of those that are not hidden.
        ignored: how many others there are, by kind.
        lost: of links that lead nowhere.
    """

    files: list[str]
    folders: set[str]
    ignored: Counter[str]
    lost: set[str]


class Place:
    """A folder or an archive that a reader is asked to recognize.

    Attributes:
        path: as the user named it.
        folder: the same if it is a folder, ``None`` for an archive.
        files: paths of its files, sorted; without those that are hidden, or skipped as asked.
        folders: paths of its folders.
        ignored: how many others there are, by kind.
        lost: paths of links that lead nowhere.
        contents: reads the files.
    """

    def __init__(self, path: Path, listing: Listing, contents: Bytes, skip: Sequence[str] = ()) -> None:
        self.path, self.contents = path, contents
        self.folder = path if path.is_dir() else None
        self.ignored = Counter(listing.ignored)
        self.files = sorted(name for name in listing.files if not _skipped(name, skip))
        self.folders = {name for name in listing.folders if not _skipped(name, skip)}
        self.lost = {name for name in listing.lost if not _skipped(name, skip)}
        if len(self.files) < len(listing.files):
            self.ignored["skipped as asked"] = len(listing.files) - len(self.files)

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        """A whole file, or ``size`` bytes of it from ``start`` on (fewer at its end)."""
        return self.contents.pread(name, start, self.contents.size(name) - start if size is None else size)

    def open_part(self, name: str, start: int, size: int) -> BinaryIO:
        """``size`` bytes of a file from ``start`` on, as a file. Unbuffered: headers of a tar lie far apart."""
        return cast(BinaryIO, _Part(self.contents, name, start, size))

    @cached_property
    def images(self) -> list[str]:
        """The files that are images: by their suffix, those without one by their bytes."""
        return [name for name in self.files if suffix(name) in SUFFIXES or self._begins_like_an_image(name)]

    def unpacked(self, packed: Iterable[str]) -> Counter[str]:
        """Which kinds of files there are besides those that are packed, and how many of each."""
        known = set(packed)
        return self.ignored + Counter(kind(name) for name in self.files if name not in known)

    def _begins_like_an_image(self, name: str) -> bool:
        if suffix(name):
            return False
        return begins_like_an_image(self.contents.pread(name, 0, HEAD_BYTES))


def kind(name: str) -> str:
    """What to call a file that is not packed: its suffix."""
    return suffix(name) or "without suffix"


def kinds_text(kinds: Counter[str]) -> str:
    """Such as "3 .txt, 1 hidden folder"."""
    return ", ".join(f"{count} {name}" for name, count in kinds.most_common())


def open_folder(path: Path, skip: Sequence[str] = ()) -> Place:
    """The place that a folder is.

    Raises:
        UserError: a folder in it cannot be read.
    """
    return Place(path, _walk(path), _FolderBytes(path), skip)


def is_hidden(part: str) -> bool:
    """Whether a folder or file of that name is passed over."""
    return part.startswith(".") or part in _LITTER


def _skipped(name: str, skip: Sequence[str]) -> bool:
    """Whether a path, or a folder that it lies in, fits one of the globs."""
    while name and skip:
        if any(fnmatchcase(name, glob.strip("/")) for glob in skip):
            return True
        name = name.rpartition("/")[0]
    return False


def _walk(root: Path) -> Listing:
    """Links are followed, but for those to a folder around them."""
    listing = Listing([], set(), Counter(), set())
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    name = f"{folder}/{entry.name}" if folder else entry.name
                    _enter(entry, name, root, listing, waiting)
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error
    return listing


def _enter(entry: os.DirEntry[str], name: str, root: Path, listing: Listing, waiting: list[str]) -> None:
    if entry.is_dir():
        if is_hidden(entry.name):
            listing.ignored["hidden folder"] += 1
        elif entry.is_symlink() and _is_around(root / name):
            listing.ignored["link to a folder around it"] += 1
        else:
            listing.folders.add(name)
            waiting.append(name)
    elif is_hidden(entry.name):
        listing.ignored["hidden"] += 1
    elif entry.is_file():
        listing.files.append(name)
    elif entry.is_symlink():
        listing.ignored["broken link"] += 1
        listing.lost.add(name)
    else:
        listing.ignored["not a file"] += 1


def _is_around(link: Path) -> bool:
    target = os.path.realpath(link)
    return os.path.commonpath([target, os.path.realpath(link.parent)]) == target


class _FolderBytes:
    """The files of a folder; a few hundred stay open."""

    def __init__(self, root: Path) -> None:
        self.root, self.opened = root, Folder(root)

    def pread(self, name: str, offset: int, length: int) -> bytes:
        return os.pread(self.opened.open(name).descriptor, length, offset)

    def size(self, name: str) -> int:
        return os.stat(self.root / name).st_size


class _Part(io.RawIOBase):
    """Part of a file of a place, as Python's libraries read files."""

    def __init__(self, contents: Bytes, name: str, start: int, size: int) -> None:
        self.contents, self.file, self.start, self.size = contents, name, start, size
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self.size - self.position))
        data = self.contents.pread(self.file, self.start + self.position, length)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)
