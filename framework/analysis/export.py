"""A trained backbone in the formats of others: timm, torchvision, torch.export, ONNX, each compared."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from jinja2 import Template
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor, nn
from torchvision import models as torchvision_models

from framework.config import loading
from framework.evaluation.run_folder import Run
from framework.runtime.errors import UserError
from framework.runtime.files import read_object

TOLERANCE = 1e-4  # largest difference of features, relative to the largest feature


def export_timm(run: Run, backbone: nn.Module, folder: Path) -> None:
    """``model.safetensors`` and ``config.json``: ``timm.create_model("local-dir:FOLDER", pretrained=True)``."""
    data, views = run.recipe.data, run.recipe.views
    save_for_hf(
        backbone,
        str(folder),
        safe_serialization=True,
        model_args=run.network_arguments,
        data_config={
            "input_size": (3, data.image_size, data.image_size),
            "mean": views.mean,
            "std": views.std,
            "crop_pct": views.center,
            "interpolation": "bicubic",
        },
    )
    again = timm.create_model(f"local-dir:{folder.resolve()}", pretrained=True).eval()
    _compare(backbone, again, _images(run), folder)


def export_torchvision(run: Run, backbone: nn.Module, path: Path) -> None:
    """A state dict that torchvision's network of the same name loads, but for its classifier.

    Raises:
        UserError: torchvision has no network whose parameters have these names and shapes.
    """
    name = run.recipe.network.name
    if name not in torchvision_models.list_models():
        raise UserError(f"torchvision has no {name}")
    theirs = torchvision_models.get_model(name, weights=None)
    state = backbone.state_dict()
    result = theirs.load_state_dict(state, strict=False)
    missing = [key for key in result.missing_keys if key.split(".")[0] not in ("fc", "classifier", "heads")]
    if missing or result.unexpected_keys:
        raise UserError(
            f"torchvision's {name} has other parameters: {[*missing, *result.unexpected_keys][0]}"
        )
    save_file(state, path, metadata={"format": "pt"})
    for classifier in {"fc", "classifier"} & dict(theirs.named_children()).keys():
        setattr(theirs, classifier, nn.Identity())
    _compare(backbone, theirs.eval(), _images(run), path)


def export_program(run: Run, backbone: nn.Module, path: Path) -> None:
    """A ``torch.export`` program of the pooled features, for any batch size."""
    images = _images(run)
    with _one_line(path):
        program = torch.export.export(backbone, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        torch.export.save(program, path)
    _compare(backbone, torch.export.load(path).module(), torch.cat([images, images]), path)


def export_onnx(run: Run, backbone: nn.Module, path: Path) -> None:
    """An ONNX model ``images`` -> ``features`` for any batch size, compared by onnxruntime.

    Raises:
        UserError: the packages are not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError("ONNX needs onnx, onnxscript and onnxruntime: install stagewise[export]") from error
    images = _images(run)
    with warnings.catch_warnings(), _one_line(path):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            backbone,
            (images,),
            path,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run_onnx(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["features"], {"images": x.numpy()})[0])

    _compare(backbone, run_onnx, torch.cat([images, images]), path)


def model_card(run: Run) -> str:
    """Markdown: what it is, how to load it, scores, recipe, environment."""
    scores = {k: v for k, v in run.result.items() if "top1" in k}
    for path in sorted((run.folder / "analysis").glob("linear_eval_*.json")):
        found = read_object(path)
        scores[f"{path.stem} top1"] = found["top1"]
        scores[f"{path.stem} top1_random_encoder"] = found["top1_random_encoder"]
    return _CARD.render(
        run=run,
        recipe=run.recipe,
        scores=scores,
        yaml=loading.to_yaml(run.recipe),
        checkpoint=run.checkpoint.name,
    )


_CARD = Template(
    """\
---
library_name: timm
tags: [image-feature-extraction, timm, local-learning]
---

# {{ run.label }}: {{ recipe.network.name }} trained with {{ recipe.method.name }}

The backbone of checkpoint {{ checkpoint }}, without heads: images
3 x {{ recipe.data.image_size }} x {{ recipe.data.image_size }}, less the mean {{ recipe.views.mean | list }},
divided by {{ recipe.views.std | list }}, to pooled features.

```python
import framework.network  # registers the networks that timm lacks
import timm

net = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True).eval()
```

## Scores

{% for name, value in scores.items() -%}
* {{ name }}: {{ "%.2f" | format(value) }} %
{% else -%}
None were measured.
{% endfor %}
Trained for {{ run.result.get("steps", "?") }} steps on {{ run.result.get("world_size", "?") }} rank(s) of
{{ run.result.get("device", "an unknown device") }}; commit {{ run.result.get("commit", "unknown") }}.

## Recipe

```yaml
{{ yaml }}```
""",
    keep_trailing_newline=True,
)


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """What PyTorch's exporters raise, of whatever type, as a ``UserError``."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"{path}: PyTorch can't export the network: {str(error).strip().splitlines()[0]}"
        ) from error


def _images(run: Run) -> Tensor:
    """Two images of noise: formats must agree on any input."""
    size = run.recipe.data.image_size
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _compare(ours: nn.Module, theirs: Callable[[Tensor], Any], images: Tensor, path: Path) -> None:
    """Refuse an export that computes something else."""
    expected, found = ours(images), theirs(images)
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error < TOLERANCE:
        raise UserError(f"{path}: computes other features than the checkpoint, by {error:.1e} of the largest")
