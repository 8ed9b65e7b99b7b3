"""Which of a network's modules are blocks, by their names and by what is in them; and its stages."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from torch import nn


def weighty(module: nn.Module) -> int:
    """Layers with a matrix or kernel: convolutions, linear layers and the like."""
    return sum(any(p.ndim >= 2 for p in m.parameters(recurse=False)) for m in module.modules())


def is_composite(module: nn.Module) -> bool:
    """Whether it has several such layers."""
    return weighty(module) >= 2


def is_layer(name: str, module: nn.Module) -> bool:
    """Whether it has weights; for networks that number no blocks."""
    return weighty(module) >= 1


def is_block(name: str, module: nn.Module) -> bool:
    """Whether it is numbered as one of several, and more than a layer.

    Args:
        name: dotted.
        module: that has this name.
    """
    last = name.rpartition(".")[2]
    if last.isdigit():  # of a list
        return weighty(module) >= 1 and any(True for _ in module.children())
    return last[-1:].isdigit() and is_composite(module)


def is_sequence(module: nn.Module) -> bool:
    """Whether blocks are somewhere inside, so that it pays to look."""
    return any(is_block(name, child) or is_sequence(child) for name, child in module.named_children())


def has_blocks(network: nn.Module) -> bool:
    """Whether it has several."""
    return sum(is_block(name, module) for name, module in network.named_modules() if name) > 1


def reported(network: nn.Module) -> list[dict[str, Any]]:
    """What timm says of the network's stages; nothing for other networks."""
    found = getattr(network, "feature_info", [])
    return [dict(info) for info in found] if isinstance(found, list) else []


def widths(network: nn.Module) -> set[int]:
    """Channels that the network says it has."""
    declared = (getattr(network, name, None) for name in ("num_features", "embed_dim", "head_hidden_size"))
    channels = [info["num_chs"] for info in reported(network)]
    for value in declared:
        channels += list(value) if isinstance(value, list | tuple) else [value]
    return {value for value in channels if isinstance(value, int)}


def reordering(network: nn.Module) -> nn.Module | None:
    """What lays tokens row by row, given them and the number of their block; ``None`` where they lie so anyway."""
    found = getattr(network, "reroll", None)
    return found if isinstance(found, nn.Module) else None


def prefix_tokens(network: nn.Module) -> int:
    """Class and register tokens that it says it has."""
    found = getattr(network, "num_prefix_tokens", 0)
    return found if isinstance(found, int) else 0


def has_class_token(network: nn.Module) -> bool:
    """Whether the first of its prefix tokens is a class token, and no register."""
    return getattr(network, "cls_token", None) is not None


def stage_ends(
    network: nn.Module, items: Sequence[str], blocks: Sequence[int]
) -> list[tuple[str, int]] | None:
    """Name of every stage, and number of its last block, as the network reports them.

    Args:
        network: any.
        items: dotted names of the modules that it calls in order; "" for what is no module.
        blocks: which of the items are blocks.

    Returns:
        ``None`` if it reports none, nothing if all are of one resolution.
    """
    infos = [info for info in reported(network) if any(_within(item, info["module"]) for item in items)]
    ends: dict[int, str] = {}
    for info in infos:
        last = max(i for i, item in enumerate(items) if _within(item, info["module"]))
        number = sum(i <= last for i in blocks) - 1
        if number >= 0:
            own = any(_within(items[i], info["module"]) for i in blocks)
            name = items[blocks[number]]
            ends[number] = info["module"] if own else _numbered(name.rpartition(".")[0]) or name
    if ends and len({info["reduction"] for info in infos}) == 1:
        return []
    if len(ends) < 2:
        return None
    final = len(blocks) - 1
    if final not in ends:  # what follows the last stage that is reported belongs to it
        ends[final] = ends.pop(max(ends))
    return [(ends[number], number) for number in sorted(ends)]


def parents(names: Sequence[str]) -> list[tuple[str, int]] | None:
    """The same by the modules that hold the blocks; ``None`` where one holds them all, or they can't be told apart.

    A block between two of a numbered holder belongs to it. One beside the holders, such as a downsampling between two
    or one of a list that serves all of them, belongs to the holder that follows.
    """
    holders = [_holder(name, names) for name in names]
    for holder in dict.fromkeys(holders):
        first, last = holders.index(holder), len(holders) - 1 - holders[::-1].index(holder)
        if holder[-1:].isdigit():
            holders[first : last + 1] = [holder] * (last + 1 - first)
    beside = {holder for holder in holders if any(other.startswith(f"{holder}.") for other in holders)}
    beside |= {holder for holder, count in Counter(h for h, _ in groupby(holders)).items() if count > 1}
    for i in reversed(range(len(holders))):
        if holders[i] in beside:
            holders[i] = holders[i + 1] if i + 1 < len(holders) else names[i]
    ends = [i for i, name in enumerate(holders) if i + 1 == len(holders) or holders[i + 1] != name]
    return [(holders[i] or names[i], i) for i in ends] if 1 < len(ends) == len(set(holders)) else None


def body(network: nn.Module, names: Sequence[str]) -> set[str]:
    """First parts of the names of blocks that belong to stages which the network reports; all if it reports none."""
    roots = {name.partition(".")[0] for name in names}
    known = {child for child, _ in network.named_children()}
    told = {info["module"].partition(".")[0] for info in reported(network)}
    return (told & roots) if told <= known and told & roots else roots


def _within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _holder(name: str, names: Sequence[str]) -> str:
    """``stages.2`` of ``stages.2.blocks.1``: the longest part that ends with a number, less the block's own."""
    parent = name.rpartition(".")[0]
    return _numbered(parent) or parent


def _numbered(path: str) -> str:
    parts = path.split(".")
    while parts and not re.search(r"\d$", parts[-1]):
        parts.pop()
    return ".".join(parts)
