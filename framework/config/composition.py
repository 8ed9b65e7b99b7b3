"""Recipe files and overrides into one tree, and who set which key.

Hydra reads ``defaults:`` lists, OmegaConf resolves interpolations; no global state stays behind.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError
from yaml.reader import ReaderError

from framework.config.renamed import up_to_date
from framework.config.schema import Fault
from framework.config.tree import Tree, over
from framework.runtime.errors import UserError

#: Every run writes its recipe, resolved, into its folder under this name. Keys of earlier versions are read in it.
RUN_RECIPE = "recipe.yaml"


class Source(NamedTuple):
    """A file or an override: ``where`` names it in messages, ``tree`` is what it sets."""

    where: str
    tree: Tree


def recipe_files(path: Path) -> list[Source]:
    """The recipe at ``path`` and those that its ``defaults:`` list names, by their paths from the recipe's folder.

    A recipe in a subfolder sets the same keys as any other, unlike a group of Hydra's. Hydra finds them and says
    in which order they go over each other, the first one undermost.

    Raises:
        UserError: no such file (the nearest names are listed), no valid YAML (with the line), a default that
            does not exist or leads back to itself.
    """
    if path.suffix != ".yaml" or not path.is_file():
        raise UserError(f"{path}: no such recipe; {_nearest(path.name, path.parent)}")
    sources = []
    with _hydra(path):
        loader = GlobalHydra.instance().config_loader()
        for entry in loader.compute_defaults_list(path.stem, [], RunMode.RUN).defaults:
            file = Path(os.path.normpath(path.parent / f"{entry.config_path}.yaml"))
            if file.is_file():  # the others are Hydra's own
                tree: Any = OmegaConf.to_container(OmegaConf.load(file))
                if not isinstance(tree, dict):
                    raise UserError(f"{file}: must hold key: value lines")
                tree.pop("defaults", None)
                sources.append(Source(str(file), up_to_date(tree) if file.name == RUN_RECIPE else tree))
    return sources


def merge(*trees: Tree) -> Tree:
    """Later trees over earlier ones, interpolations such as ``${name}`` resolved.

    Raises:
        Fault: an interpolation that leads nowhere.
    """
    try:
        tree = OmegaConf.to_container(OmegaConf.create(reduce(over, trees)), resolve=True)
    except OmegaConfBaseException as error:
        raise Fault(str(error.full_key), "${...}", str(error.msg or error).splitlines()[0]) from error
    return tree  # type: ignore[return-value]


def origin(key: str, sources: Sequence[Source]) -> str | None:
    """Where ``key`` was set last; ``None`` if nowhere."""
    for source in reversed(sources):
        if _sets(source.tree, key.split(".")):
            return source.where
    return None


def _sets(tree: Any, parts: list[str]) -> bool:
    """Whether ``tree`` gives the key a value, be it through a scalar that stands for a whole section."""
    for part in parts:
        if not isinstance(tree, dict):
            return True
        if part not in tree:
            return False
        tree = tree[part]
    return True


@contextmanager
def _hydra(path: Path) -> Iterator[None]:
    """Hydra with the recipe's folder as its only place to look; its errors become single lines."""
    folder = path.parent
    try:
        with warnings.catch_warnings(), initialize_config_dir(str(folder.resolve()), version_base="1.3"):
            warnings.filterwarnings("ignore", message=".*missing `_self_`")  # it comes last, as one expects
            yield
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{_shown(Path(mark.name), folder)}, line {mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: broken YAML: {error.problem}") from error
    except ReaderError as error:
        where = _shown(Path(error.name), folder)
        raise UserError(f"{where}, character {error.position + 1}: broken YAML: {error.reason}") from error
    except MissingConfigException as error:
        missing = Path(os.path.normpath(folder / f"{error.missing_cfg_file}.yaml"))
        there = _nearest(missing.name, missing.parent)
        raise UserError(f"{path}: defaults name {missing}, which does not exist; {there}") from error
    except RecursionError as error:
        raise UserError(
            f"{path}: leads back to itself, by its defaults or an anchor, or is nested too deeply"
        ) from error
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        text = str(error).partition("\n    full_key")[0]
        raise UserError(f"{path}: {' '.join(text.split())}") from error


def _shown(file: Path, folder: Path) -> str:
    """The path of a file as the recipe's folder was given, not from the root."""
    return os.path.normpath(folder / os.path.relpath(file, folder.resolve()))


def _nearest(name: str, folder: Path) -> str:
    there = sorted(file.name for file in folder.glob("*.yaml"))
    near = get_close_matches(name, there, n=3, cutoff=0.4) or there[:10]
    return f"{folder}/ has {', '.join(near) or 'no recipes'}"
