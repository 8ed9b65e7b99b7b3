"""Shards and indexes with flipped bits and cut off ends: right, or one line."""

from __future__ import annotations

import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.data.loading.decode import BrokenImage, decode
from framework.data.packing.writer import write_shards
from framework.data.shards.index import ShardSet
from framework.runtime.errors import UserError
from tests.support.shards import png, samples, write_tar


def _corrupted(data: bytes, cut: int | None, flips: list[tuple[int, int]], mend: bool) -> bytes:
    """``mend`` repairs the checksums of headers, so that the flipped fields are believed."""
    damaged = bytearray(data[:cut])
    for position, value in flips:
        damaged[position % len(damaged)] = value
    for start in range(0, len(damaged) - 511, 512) if mend else ():
        if damaged[start + 257 : start + 262] == b"ustar":
            header = damaged[start : start + 148] + b" " * 8 + damaged[start + 156 : start + 512]
            damaged[start + 148 : start + 156] = b"%06o\0 " % sum(header)
    return bytes(damaged)


@pytest.fixture(scope="module")
def whole_shard(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    members = [(f"{i}.{end}", data) for i in range(3) for end, data in (("cls", b"%d" % i), ("png", png(i)))]
    return write_tar(folder / "a.tar", members, tarfile.PAX_FORMAT).read_bytes()[:4608]


header_byte = st.builds(lambda member, byte: 512 * member + byte, st.integers(0, 8), st.integers(0, 511))


@settings(max_examples=250, deadline=None)
@given(
    cut=st.none() | st.integers(1, 4607),
    flips=st.lists(st.tuples(header_byte, st.integers(0, 255)), max_size=3),
    mend=st.booleans(),
)
def test_damaged_shards_give_user_errors_only(whole_shard, cut, flips, mend):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "a.tar").write_bytes(_corrupted(whole_shard, cut, flips, mend))
        try:
            shards = ShardSet.open(Path(folder))
            for i in range(len(shards)):
                decode(shards.read(i))
        except (UserError, BrokenImage):
            return
    assert len(shards) <= 3


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(["index.json", "index.npz"]),
    cut=st.none() | st.integers(0, 200),
    flips=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=2),
)
def test_damaged_index_is_noticed_or_harmless(name, cut, flips):
    with tempfile.TemporaryDirectory() as folder:
        write_shards(samples(2), Path(folder, "a"), ["x", "y", "z"])
        path = Path(folder, "a", name)
        path.write_bytes(_corrupted(path.read_bytes(), cut, flips if cut != 0 else [], mend=False))
        try:
            shards = ShardSet.open(Path(folder, "a"))
        except UserError:
            return
        assert [shards.read(i) for i in range(len(shards))] == [png(0), png(1)]
