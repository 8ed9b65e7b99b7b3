"""Keys and values that had another name in earlier versions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from framework.config.tree import Tree, get, has, nested, over, without

#: dotted key -> its name now
KEYS = {
    "data.share": "data.fraction",
    "data.source": "data.prepare",
    "evaluate.neighbours": "evaluate.neighbors",
    "views.centre": "views.center",
    "views.greyscale": "views.grayscale",
}
#: dotted key, as it is called now -> value -> its name now
VALUES = {
    "data.prepare": {"shards": "none"},
    "method.lam_weights": {"single_pulled": "trained_and_pulled"},
}


class Renamed(NamedTuple):
    """``key=value`` of earlier versions, and what to write now."""

    key: str
    value: object
    new_key: str
    new_value: object


def renamed(tree: Tree) -> Iterator[Renamed]:
    """What of a recipe's values has another name now."""
    for key in (*KEYS, *VALUES):
        if has(tree, key):
            value, new_key = get(tree, key), KEYS.get(key, key)
            names = VALUES.get(new_key, {})
            new_value = names.get(value, value) if isinstance(value, str) else value
            if (key, value) != (new_key, new_value):
                yield Renamed(key, value, new_key, new_value)


def dotted_up_to_date(values: Mapping[str, object]) -> dict[str, object]:
    """The same of values by dotted key."""
    found = {}
    for old, value in values.items():
        key = KEYS.get(old, old)
        found[key] = VALUES.get(key, {}).get(value, value) if isinstance(value, str) else value
    return found


def up_to_date(tree: Tree) -> Tree:
    """A copy of a recipe's values in which every key and value has its name of now."""
    for old in renamed(tree):
        tree = over(without(tree, old.key), nested(old.new_key, old.new_value))
    return tree
