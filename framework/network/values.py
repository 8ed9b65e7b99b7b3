"""What stands for tensors, their types and their sizes in recorded calls."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

#: images in the batch that is traced: a size that is a multiple of it is taken for one that grows with the batch
BATCH = 1009


class Value(NamedTuple):
    """A tensor that a call made; ``number`` counts all of them."""

    number: int


class Own(NamedTuple):
    """A parameter, buffer or other tensor of the network, by its dotted name."""

    name: str


class Like(NamedTuple):
    """The type or device of a tensor."""

    value: Value
    attribute: str


class Size(NamedTuple):
    """The size of a tensor along a dimension."""

    value: Value
    dimension: int


class Computed(NamedTuple):
    """Arithmetic with sizes."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]


class Given(NamedTuple):
    """A whole number that a module returned; it may depend on the size of the images."""

    number: int


class TracedInt(int):
    """A whole number that knows how it follows from the sizes of tensors."""

    source: Size | Computed | Given

    @classmethod
    def of(cls, number: int, source: Size | Computed | Given) -> TracedInt:
        """A number and where it is from."""
        made = cls(number)
        made.source = source
        return made

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)

    def __deepcopy__(self, memo: object) -> TracedInt:
        return self


def _arithmetic(name: str, reflected: bool) -> Callable[[TracedInt, int], Any]:
    function = getattr(operator, name)

    def compute(self: TracedInt, other: int) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        a, b = (other, self) if reflected else (self, other)
        number = function(int(a), int(b))
        return TracedInt.of(number, Computed(function, (a, b))) if isinstance(number, int) else number

    return compute


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    setattr(TracedInt, f"__{_name}__", _arithmetic(_name, reflected=False))
    setattr(TracedInt, f"__r{_name}__", _arithmetic(_name, reflected=True))
TracedInt.__neg__ = lambda self: 0 - self  # type: ignore[method-assign]


def leaves(tree: Any) -> Iterator[Any]:
    """The leaves of nested lists, tuples, dictionaries and slices; ``Value`` and its kin are leaves."""
    if isinstance(tree, Value | Own | Like):
        yield tree
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from leaves(item)
    elif isinstance(tree, dict):
        yield from leaves(list(tree.values()))
    elif isinstance(tree, slice):
        yield from leaves((tree.start, tree.stop, tree.step))
    else:
        yield tree


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """The tree with ``function`` of every leaf."""
    if isinstance(tree, Value | Own | Like):
        return function(tree)
    if isinstance(tree, list | tuple):
        items = [mapped(function, item) for item in tree]
        return items if isinstance(tree, list) else tuple(items)
    if isinstance(tree, dict):
        return {key: mapped(function, item) for key, item in tree.items()}
    if isinstance(tree, slice):
        return slice(*(mapped(function, part) for part in (tree.start, tree.stop, tree.step)))
    return function(tree)
