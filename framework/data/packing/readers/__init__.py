"""What can be packed: every file of this folder defines one ``READER``, or several in ``READERS``.

A data set is added by a new file; it is found by being here, and needs no entry elsewhere. ``make_shards.py --help``
and the table in ``framework/data/README.md`` are made of what is found.
All files are imported at every start, which must stay quick: what is slow (torchvision, SciPy) is imported where it
is used.
"""

from __future__ import annotations

import os
import pkgutil
from functools import cache
from pathlib import Path

from framework.data.packing.archives import open_archive
from framework.data.packing.place import open_folder
from framework.data.packing.readers import shards
from framework.data.packing.reading import Choices, Reader, Reading, choose
from framework.data.shards.naming import names_shards
from framework.data.shards.store import is_url
from framework.runtime.errors import UserError
from framework.runtime.imports import import_found


@cache
def all_readers() -> tuple[Reader, ...]:
    """The readers of all files here: by ``Reader.generality``, then by file, then as the file lists them.

    Raises:
        UserError: a file can't be imported, or defines no reader; two readers have the same name.
    """
    readers: dict[str, Reader] = {}
    files: dict[str, str | None] = {}
    for name in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        module = import_found(f"{__name__}.{name}")
        defined = vars(module).get("READERS", (vars(module).get("READER"),))
        for reader in defined:
            if not isinstance(reader, Reader):
                raise UserError(f"{module.__file__}: must define READER, a Reader (or READERS, several)")
            if reader.name in readers:
                raise UserError(
                    f"{module.__file__}: {files[reader.name]} has a reader named {reader.name}, too"
                )
            readers[reader.name], files[reader.name] = reader, module.__file__
    return tuple(sorted(readers.values(), key=lambda reader: reader.generality))


def read(sources: list[str], choices: Choices, work: Path, cache: Path, cache_bytes: int) -> Reading:
    """How to read a source.

    Args:
        sources: a folder, an archive, shards by a pattern, a URL of shards; or several shards, as a shell makes of a
            pattern.
        choices: what the user says about it.
        work: an existing folder with room to unpack a compressed archive (nothing is left in it).
        cache: for shards of a URL.
        cache_bytes: its bound.

    Raises:
        UserError: it is nothing that is known, or damaged, or could be several things.
    """
    if len(sources) > 1:
        return shards.read_files(sources, choices)
    path = sources[0]
    if is_url(path):
        return shards.read_url(path, choices, cache, cache_bytes)
    place = Path(path)
    if os.path.isdir(path):
        return choose(open_folder(place, choices.skip), all_readers(), choices)
    if os.path.isfile(path):
        return choose(open_archive(place, work, choices.skip), all_readers(), choices)
    if names_shards(path) and os.path.isdir(place.parent):
        return shards.read_pattern(path, choices)
    raise UserError(f"{place}: no such file or folder")
