"""How what lies at a source can be read: readers, their readings, and the choice among these.

A reader (``readers/``) says whether it recognizes a place. All readers are asked; exactly one reading must fit,
or the user chooses one by its reader's name.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from framework.data.packing.images import Images
from framework.data.packing.place import Place, kinds_text
from framework.runtime.errors import UserError
from framework.runtime.text import printable


@dataclass(frozen=True)
class Choices:
    """What the user says about a source.

    Attributes:
        reader: name of the reader to take; ``None`` for the only one that recognizes it.
        skip: globs of paths below it to leave out.
        file_column: of a table of labels; ``None`` for one known by its name.
        label_column: of a table of labels, or key of the shards' ``.json``; ``None`` as above.
    """

    reader: str | None = None
    skip: Sequence[str] = ()
    file_column: str | None = None
    label_column: str | None = None


@dataclass(frozen=True)
class Reading:
    """One way to read a place.

    Attributes:
        reader: name of the reader.
        summary: what it sees there, in a few words.
        open: the images of every split by its name; a place without splits has one, named "". Raises ``UserError``.
        unpacked: which kinds of files it leaves out, and how many.
        replaces: names of readers that would also accept the place, but see less in it (no labels, say): where this
            reading fits, theirs are not offered.
    """

    reader: str
    summary: str
    open: Callable[[], dict[str, Images]]
    unpacked: Counter[str] = field(default_factory=Counter)
    replaces: frozenset[str] = frozenset()


class Incomplete(UserError):
    """A reader knows the place but cannot read it; this is told only if no other reader can."""


@dataclass(frozen=True)
class Reader:
    """Recognizes one kind of data set.

    Attributes:
        name: what ``--as`` takes.
        recognizes: what must lie at the source, for help and documentation.
        becomes: the splits that come of it.
        find: the reading of a place, or ``None`` where the place is something else. ``Choices.reader`` says whether
            the user asked for this reader, which may then accept what it would not guess. Raises ``Incomplete``, or
            ``UserError`` where no other reading should be taken in silence.
        overrules: names of readers that would also accept the place, but see less in it (no labels, say). Where
            ``find`` raises ``Incomplete``, the user is told of it even though one of these could read the place.
        generality: 0 for one data set that is known by its own files, 1 for a table of labels, 2 for folders, 3 for
            shards. Less general readers come first in the help, and of several complaints theirs is told.
    """

    name: str
    recognizes: str
    becomes: str
    find: Callable[[Place, Choices], Reading | None]
    overrules: frozenset[str] = frozenset()
    generality: int = 0


def choose(place: Place, readers: Sequence[Reader], choices: Choices) -> Reading:
    """The reading of a place.

    Raises:
        UserError: none fits, or several; the message says what would choose one.
    """
    if choices.reader is not None:
        reader = next(reader for reader in readers if reader.name == choices.reader)
        if (reading := reader.find(place, choices)) is None:
            raise UserError(f"{place.path}: is not what --as '{reader.name}' reads ({reader.recognizes})")
        return reading
    readings, problems = _ask(place, readers, choices)
    replaced = frozenset().union(*(reading.replaces for reading in readings.values()))
    readings = {name: reading for name, reading in readings.items() if name not in replaced}
    for reader in readers:
        problem = problems.get(reader.name)
        left = readings.keys() - reader.overrules
        if problem is None or (left and isinstance(problem, Incomplete)):
            continue
        options = "".join(f"; or choose {_option(reading)}" for reading in readings.values())
        raise UserError(f"{problem}{options}") from problem
    if len(readings) > 1:
        options = " or ".join(map(_option, readings.values()))
        raise UserError(f"{place.path}: can be read in {len(readings)} ways; choose {options}")
    if not readings:
        found = kinds_text(place.unpacked([])) or "nothing"
        raise UserError(f"{place.path}: holds no images that make_shards.py knows how to read, but {found}")
    return next(iter(readings.values()))


def _ask(
    place: Place, readers: Sequence[Reader], choices: Choices
) -> tuple[dict[str, Reading], dict[str, UserError]]:
    """By name: the readings that fit, and what is wrong where a reader knows the place but can't read it."""
    readings: dict[str, Reading] = {}
    problems: dict[str, UserError] = {}
    for reader in readers:
        try:
            reading = reader.find(place, choices)
        except UserError as error:
            problems[reader.name] = error
        else:
            if reading is not None:
                readings[reader.name] = reading
    return readings, problems


def _option(reading: Reading) -> str:
    return f"--as '{reading.reader}' ({reading.summary})"


def check_apart(source: str, dest: Path) -> None:
    """Refuse to write into the source, or to what can't be a folder.

    Raises:
        UserError: ``dest`` is the source, or lies in it; it is a file, or no possible name.
    """
    check_destination(dest)
    if not os.path.isdir(source):
        return
    inside, around = dest.resolve(), Path(source).resolve()
    if inside == around or around in inside.parents:
        raise UserError(f"{dest}: lies in {source}, which is only read; name a folder elsewhere")


def check_destination(folder: Path) -> Path:
    """Check that a folder may be made, before hours of packing; returns the one around it that is there.

    Raises:
        UserError: a file or a link is in its way; its name is impossible here.
    """
    try:
        if os.path.lexists(folder) and not folder.is_dir():
            raise UserError(
                f"{folder}: is in the way, a file or a link that leads nowhere; name another folder"
            )
        around = next((path for path in folder.absolute().parents if path.exists()), folder)
        for name in [*folder.absolute().relative_to(around).parts, f".{folder.name}.partial"]:
            with suppress(FileNotFoundError):
                (around / name).lstat()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{printable(str(folder))}: cannot be written: {reason}") from error
    return around
