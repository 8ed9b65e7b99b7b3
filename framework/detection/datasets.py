"""COCO and Cityscapes as Detectron2 knows them, subsets of COCO, and whether the files are there at all."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.datasets.builtin_meta import _get_builtin_metadata
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    COCOEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
)

from framework.runtime.errors import UserError

SUBSET = re.compile(r"coco_2017_train_(\d+)_split(\d+)")


def root() -> Path:
    """Folder with ``coco/`` and ``cityscapes/``: the environment's ``DETECTRON2_DATASETS``, or ``datasets``."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def prepare(names: Iterable[str]) -> None:
    """Register the subsets of COCO among ``names``, and see that the files of all of them exist.

    A subset of N images is called ``coco_2017_train_N_splitS``; ``tools/make_coco_splits.py`` writes its annotations.

    Raises:
        UserError: a set is unknown, a file is missing, or Cityscapes' scripts are.
    """
    for name in names:
        if (match := SUBSET.fullmatch(name)) and name not in DatasetCatalog.list():
            annotations = root() / f"coco/annotations/instances_train2017_{match[1]}_split{match[2]}.json"
            images = root() / "coco/train2017"
            register_coco_instances(name, _get_builtin_metadata("coco"), str(annotations), str(images))
        if name not in DatasetCatalog.list():
            raise UserError(f"DATASETS: {name}: unknown; {SUBSET.pattern} is what a subset of COCO is called")
        _check_files(name)
        if name.startswith("cityscapes"):
            _provide_cityscapes_scripts()


def evaluator(name: str, output_dir: str) -> DatasetEvaluator:
    """Box and mask AP. Cityscapes' own evaluator has masks only, so COCO's does the boxes, as in mmdetection."""
    if MetadataCatalog.get(name).evaluator_type == "cityscapes_instance":
        boxes = COCOEvaluator(name, tasks=("bbox",), output_dir=output_dir, allow_cached_coco=False)
        return DatasetEvaluators([boxes, CityscapesInstanceEvaluator(name)])
    both = ("bbox", "segm")  # else it scores those of which something was found
    return COCOEvaluator(name, tasks=both, output_dir=output_dir)


def _check_files(name: str) -> None:
    metadata = MetadataCatalog.get(name)
    for key in ("json_file", "image_root", "image_dir", "gt_dir"):
        path = metadata.get(key, None)
        if path and not Path(path).exists():
            how = (
                " (tools/make_coco_splits.py writes it)"
                if SUBSET.fullmatch(name) and key == "json_file"
                else ""
            )
            raise UserError(
                f"{path}: missing{how}; DETECTRON2_DATASETS={root()} must hold the set {name}; "
                "recipes/detectron2/README.md has the layout"
            )


def _provide_cityscapes_scripts() -> None:
    """Make Cityscapes' scripts (2.3) run: Detectron2 imports them by the name that they have inside Meta, and NumPy
    2.4 has dropped ``in1d`` and counts in integers of its own, which their JSON of all matches can't take. Nobody
    reads that file, and it would land in the working folder.
    """
    for package in ("cityscapesscripts", "shapely"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"Cityscapes needs the package {package}: pip install cityscapesscripts shapely")
    vars(np).setdefault("in1d", np.isin)
    inside = "deeplearning.projects.cityscapesApi"
    parts = inside.split(".")
    for length in range(1, len(parts) + 1):
        name = ".".join(parts[:length])
        sys.modules.setdefault(name, ModuleType(name))
    for module in (
        "",
        ".helpers",
        ".helpers.labels",
        ".evaluation",
        ".evaluation.evalInstanceLevelSemanticLabeling",
    ):
        sys.modules[f"{inside}.cityscapesscripts{module}"] = scripts = importlib.import_module(
            f"cityscapesscripts{module}"
        )
    vars(scripts)["writeDict2JSON"] = lambda content, path: None
