"""Tables in CSV files, to which benchmarks add each row as soon as it is measured."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from framework.runtime.files import write_whole


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV; none if it isn't there."""
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def is_in(path: Path, setting: dict[str, Any]) -> bool:
    """Whether a CSV has a row of these conditions."""
    return any(all(str(value) == line.get(key) for key, value in setting.items()) for line in read(path))


def append(path: Path, result: dict[str, Any]) -> None:
    """Write a row below those of a CSV, which is whole at any moment."""
    rows = [*read(path), {key: value for key, value in result.items() if key != "heads"}]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(dict.fromkeys(k for r in rows for k in r)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, buffer.getvalue())
