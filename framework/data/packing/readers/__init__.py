"""The registry of what can be packed.

A data set is added by a ``Reader`` of its own: in a new file of this folder, or beside a similar one; either way it
is listed in ``READERS`` below, from where ``make_shards.py --help`` and ``framework/data/README.md`` have their tables.
Importing this must stay quick: what is slow (torchvision, SciPy) is imported where it is used.
"""

from __future__ import annotations

from pathlib import Path

from framework.data.packing.archives import open_archive
from framework.data.packing.place import open_folder
from framework.data.packing.readers import folders, imagenet, shards, tables, torchvision_sets
from framework.data.packing.reading import Choices, Reader, Reading, choose
from framework.data.shards.naming import names_shards
from framework.data.shards.store import is_url
from framework.runtime.errors import UserError

#: In the order of help; where several readers complain, the first is heard.
READERS: tuple[Reader, ...] = (
    *imagenet.READERS,
    *torchvision_sets.READERS,
    *tables.READERS,
    *folders.READERS,
    *shards.READERS,
)


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
    if place.is_dir():
        return choose(open_folder(place, choices.skip), READERS, choices)
    if place.is_file():
        return choose(open_archive(place, work, choices.skip), READERS, choices)
    if names_shards(path) and place.parent.is_dir():
        return shards.read_pattern(path, choices)
    raise UserError(f"{place}: no such file or folder")
