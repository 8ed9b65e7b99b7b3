"""Fixtures of the tests of recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

BASE = """
data: {path: data/digits, prepare: digits, workers: 0}
train: {epochs: 20, batch_size: 256}
optim: {lr: 1.0}
"""


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder ``recipes`` below the working directory with ``base.yaml`` in it."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "base.yaml").write_text(BASE)
    return folder
