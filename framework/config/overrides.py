"""Overrides on the command line, in Hydra's grammar, and what they do to the files below them.

* ``key=value`` sets the key. ``+key=value`` and ``++key=value`` do the same, since the schema has every key.
* ``key=[1,2]`` is a list. ``key={a:1}`` is a section, which goes over what the section holds.
* ``key='a text'`` or ``"a text"`` is quoted text, which may hold anything; a number in quotes is a text, too.
* ``key=${other.key}`` is an interpolation; ``${oc.env:HOME}`` is an environment variable.
* ``~key`` goes back to the schema's default; ``~key=value`` does so only if ``value`` is what the key is set to.
* ``key=int(3.0)``: of Hydra's functions those that give one value, ``int``, ``float``, ``str`` and ``bool``.

A value that Hydra's grammar has no place for, such as the path ``/a b/(c)=d``, is taken as the text it is. Refused are
sweeps (``1,2``, ``range(1,9)``: a run has one value), packages and config groups (``key@package``, ``group/name``:
recipes have none), and a key that is set twice in a row to different values, which is what a shell makes of braces
that are not quoted. Elsewhere the last value of a key counts, so that scripts can put their defaults in front.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from framework.config.composition import Source
from framework.config.tree import get, has, nested, without
from framework.runtime.errors import UserError

COMMAND_LINE = "command line"

# What Hydra's grammar has no place for, but paths hold: ~ ( ) = & é, and names of shards: a-{000..127}.tar, a-[0-9].tar
_PLAIN = re.compile(r"\+{0,2}([\w.]+)=([^'\"\[\]{},$\s](?:[^'\"\[\]{},$]|\{[^{}'\"$]*\}|\[[^\[\]'\"$]*\])*)")


class Override(NamedTuple):
    """One argument.

    Attributes:
        text: as it was given.
        key: dotted.
        value: what it is set to, or must be in order to be deleted.
        deletes: whether the key goes back to its default.
    """

    text: str
    key: str
    value: Any
    deletes: bool = False


def parse(text: str) -> Override:
    """An argument of the command line.

    Raises:
        UserError: not of a form that the module's docstring lists.
    """
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        if plain := _PLAIN.fullmatch(text):
            return Override(text, plain[1], plain[2])
        hint = (
            "quote the value, and that from the shell: \"key='value'\"" if "=" in text else "write key=value"
        )
        raise UserError(f"{COMMAND_LINE}: {text}: {hint} ({str(error).splitlines()[0]})") from error
    key = override.key_or_group
    if override.is_sweep_override():
        raise UserError(f"{COMMAND_LINE}: {text}: write key=value with one value; a list is key=[a,b]")
    if override.package is not None or "/" in key or not key:
        raise UserError(
            f"{COMMAND_LINE}: {text}: write section.key=value; recipes have no packages and config groups"
        )
    return Override(text, key, override.value(), override.is_delete())


def check_repeated(overrides: Sequence[Override]) -> None:
    """Refuse ``data.train=a-{0..7}.tar`` that a shell has expanded, since only the last of these would count.

    Raises:
        UserError: neighbors set the same key to different values.
    """
    for first, second in pairwise(overrides):
        sections = isinstance(first.value, dict) and isinstance(second.value, dict)
        if first.key != second.key or first.deletes or second.deletes or sections:
            continue
        if first.value != second.value:
            raise UserError(
                f"{COMMAND_LINE}: {first.text} {second.text}: sets {first.key} twice; leave one out, or, "
                f"if a shell made them of braces, quote these: '{first.key}=a-{{000..127}}.tar'"
            )


def apply(files: Sequence[Source], overrides: Sequence[Override]) -> tuple[list[Source], list[Override]]:
    """The sources with the overrides on top, in order; and the deletions of keys that nothing had set.

    Raises:
        UserError: a deletion ``~key=value`` of a key with another value.
    """
    sources, idle = list(files), []
    for override in overrides:
        if not override.deletes:
            sources.append(Source(COMMAND_LINE, nested(override.key, override.value)))
            continue
        found = [get(source.tree, override.key) for source in sources if has(source.tree, override.key)]
        if not found:
            idle.append(override)
        elif override.value is not None and override.value != found[-1]:
            raise UserError(f"{COMMAND_LINE}: {override.text}: {override.key} is {found[-1]}")
        sources = [source._replace(tree=without(source.tree, override.key)) for source in sources]
    return sources, idle
