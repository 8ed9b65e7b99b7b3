"""Values of a recipe in nested dictionaries, and dotted keys into them."""

from __future__ import annotations

from typing import Any

Tree = dict[str, Any]


def has(tree: Any, key: str) -> bool:
    """Whether the dotted key is there."""
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True


def get(tree: Tree, key: str) -> Any:
    """The value of a dotted key that is there."""
    value: Any = tree
    for part in key.split("."):
        value = value[part]
    return value


def nested(key: str, value: Any) -> Tree:
    """The tree that holds this key alone."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def over(lower: Any, upper: Any) -> Any:
    """Both, section by section; where both have a value that of ``upper``."""
    if not isinstance(lower, dict) or not isinstance(upper, dict):
        return upper
    return lower | {key: over(lower.get(key), value) for key, value in upper.items()}


def without(tree: Any, key: str) -> Any:
    """A copy less one dotted key, whether it is there or not."""
    first, _, rest = key.partition(".")
    if not isinstance(tree, dict) or first not in tree:
        return tree
    if not rest:
        return {name: value for name, value in tree.items() if name != first}
    return tree | {first: without(tree[first], rest)}
