"""Keys that belong to what another key selects: the options of a method, the arguments of a network.

A recipe sets ``method.window`` for its own method. Where a recipe above it, or the command line, selects another
method, that value was not meant for it: it is dropped, and a line says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from framework.config.composition import Source
from framework.config.overrides import COMMAND_LINE
from framework.config.tree import Tree, has, without


class Selector(NamedTuple):
    """The key ``section.name`` selects what other keys of the section belong to.

    Attributes:
        section: of the recipe.
        default: what is selected if nobody selects.
        others: the keys that belong to the selected one; ``None`` means all others of the section.
    """

    section: str
    default: str
    others: tuple[str, ...] | None = None

    @property
    def key(self) -> str:
        """The key that selects."""
        return f"{self.section}.name"

    def choice(self, tree: Tree) -> str | None:
        """What a source selects; ``None`` if it leaves that to others."""
        return str(tree[self.section]["name"]) if has(tree, self.key) else None

    def dependent(self, tree: Tree) -> list[str]:
        """Dotted keys of a source that belong to what is selected."""
        section = tree.get(self.section)
        if not isinstance(section, dict):
            return []
        names = [name for name in section if name != "name" and (self.others is None or name in self.others)]
        return [f"{self.section}.{name}" for name in names if section[name] != {}]  # {} sets nothing

    def resets(self, tree: Tree) -> bool:
        """Whether a source empties the section, as ``method=null`` does."""
        return self.section in tree and not isinstance(tree[self.section], dict)


def drop(sources: Sequence[Source], selector: Selector) -> tuple[list[Source], list[str]]:
    """The sources without what files set for something else than is selected; and lines that say what was dropped.

    A file that selects nothing means what a file below it selects, or else the next one above it. The command line
    always means what is selected in the end, so that a wrong key there is an error.
    """
    if any(selector.resets(source.tree) for source in sources):
        return list(sources), []
    files = [source for source in sources if source.where != COMMAND_LINE]
    chosen = [selector.choice(source.tree) for source in sources]
    final = next((name for name in reversed(chosen) if name), selector.default)
    meant = next((name for name in chosen[: len(files)] if name), selector.default)
    kept, lines = [], []
    for source, choice in zip(files, chosen, strict=False):
        meant = choice or meant
        keys = selector.dependent(source.tree)
        if meant != final and keys:
            source = source._replace(tree=_less(source.tree, keys))
            lines.append(
                f"{source.where}: dropped {', '.join(keys)}: set for {selector.key}={meant}, and it is {final} now"
            )
        kept.append(source)
    return [*kept, *sources[len(files) :]], lines


def _less(tree: Tree, keys: Sequence[str]) -> Tree:
    for key in keys:
        tree = without(tree, key)
    return tree
