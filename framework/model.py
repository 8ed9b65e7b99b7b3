"""From names to a network that trains with local losses."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from framework import network as networks
from framework.config.recipe import Recipe
from framework.execution import LocalNetwork
from framework.local import MethodOptions, NetworkInfo, Plan, methods
from framework.local.methods import Method
from framework.network import Cut, Segment
from framework.network.norm import synchronize
from framework.network.sharded_init import built_in_slices
from framework.runtime.errors import UserError


def local_network(
    network: str | nn.Module,
    method: str,
    options: MethodOptions | None = None,
    *,
    image_size: int,
    num_classes: int = 0,
    cut: Cut = "stage",
    stem_as_module: bool = False,
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
    precision: str = "fp32",
    sync_bn: bool = False,
    channels_last: bool = False,
    skip_nonfinite: bool = False,
    label_smoothing: float = 0.0,
    recompute: str = "none",
) -> LocalNetwork:
    """A network cut into segments, with the local units of a method on it.

    Args:
        network: a timm name, or a network without classifier.
        method: one of ``framework.local.methods.names()``.
        options: the method's ``Options``; ``None`` means as published.
        image_size: side of the square images in pixels.
        num_classes: classes, for supervised methods.
        cut: where to cut the network into segments; see ``framework.network.cut``.
        stem_as_module: whether the stem is a segment of its own; see there.
        mean: subtracted from the images' channels; for heads that reconstruct the images.
        std: what the images' channels were divided by.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        sync_bn: BatchNorm over all ranks.
        channels_last: keep images and activations in channels-last order.
        skip_nonfinite: report losses and gradients that are infinite or NaN as an overflow, so that engines skip the
            step.
        label_smoothing: of every cross entropy.
        recompute: activations that are computed again in place of being kept: ``"segment"`` or ``"block"``.

    Raises:
        UserError: a name is unknown, or the network can't be cut or planned that way.
    """
    if num_classes < 0:
        raise UserError(f"num_classes={num_classes}: must be at least 0")
    chosen = methods.load(method)
    options = chosen.Options() if options is None else options
    backbone = networks.create(network) if isinstance(network, str) else network
    segments = networks.cut(backbone, cut, stem_as_module, image_size)
    info = NetworkInfo.of(segments, image_size, num_classes, mean, std, label_smoothing)
    plan = _planned(chosen, info, options)
    if plan.execution != options.execution:
        raise UserError(f"method.name={method}: its plan must be made with execution=options.execution")
    if num_classes < 1 and any(head.classifies for head in plan.heads):
        raise UserError(f"num_classes={num_classes}: method {method} classifies, so it must be at least 1")
    if label_smoothing and not any(head.soft_labels for head in plan.heads):
        raise UserError(
            f"train.label_smoothing={label_smoothing:g}: method.name={method} has no cross entropy; must be 0"
        )
    frozen: list[Segment] = []
    if (alone := plan.execution.module) is not None:
        plan, frozen, segments = plan.only(alone), segments[:alone], segments[alone : alone + 1]
        trained = {*segments[0].parameters(), *(p for head in plan.heads for p in head.parameters())}
        for parameter in backbone.parameters():
            parameter.requires_grad_(parameter in trained)
    net = LocalNetwork(backbone, segments, plan, precision, channels_last, frozen, skip_nonfinite, recompute)
    if sync_bn:
        synchronize(net)
    return net


def _planned(method: Method, network: NetworkInfo, options: MethodOptions) -> Plan:
    """What a method's ``plan`` gives.

    Raises:
        UserError: the method is impossible here; ``plan`` fails, or gives something else than a plan.
    """
    file = Path(inspect.getfile(method.plan))
    try:
        plan = method.plan(network, options)
    except UserError:
        raise
    except Exception as error:  # whatever a file does; heads may also ask for more memory than there is
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f.lineno for f in reversed(frames) if Path(f.filename) == file), 1)
        reason = " ".join(str(error).split())
        raise UserError(f"{file}, line {line}: plan fails: {type(error).__name__}: {reason}") from error
    if not isinstance(plan, Plan):
        raise UserError(f"{file}: plan(network, options) gives {type(plan).__name__}, must return a Plan")
    return plan


def recipe_network(recipe: Recipe, num_classes: int) -> LocalNetwork:
    """The recipe's network as its seed initializes it, on the CPU, in training mode.

    Raises:
        UserError: as ``local_network``.
    """
    torch.manual_seed(recipe.seed)
    backbone = networks.create(recipe.network.name, **recipe.network.args)
    networks.freeze(backbone, recipe.network.freeze)
    net = local_network(
        backbone,
        recipe.method.name,
        recipe.method.options,
        image_size=recipe.data.image_size,
        num_classes=num_classes,
        cut=recipe.network.cut,
        stem_as_module=recipe.network.stem_as_module,
        mean=recipe.views.mean,
        std=recipe.views.std,
        precision=recipe.train.precision,
        sync_bn=recipe.network.sync_bn,
        channels_last=recipe.network.channels_last,
        skip_nonfinite=recipe.faults.nonfinite == "skip",
        label_smoothing=recipe.train.label_smoothing,
        recompute=recipe.execution.recompute,
    ).train()
    for segment in net.segments:
        if not any(True for _ in segment.parameters()):
            raise UserError(f"network.freeze: nothing in segment {segment.name} would be trained")
    if recipe.train.ema:
        net.keep_average(recipe.train.ema)
    if recipe.execution.compile:
        net.compile_segments()
    return net


def sliced_network(recipe: Recipe, num_classes: int, rank: int, ranks: int) -> LocalNetwork:
    """The same without ever being whole: large tensors have no memory, and ``made`` has one rank's slices of them.

    Args:
        recipe: of the network.
        num_classes: of the data.
        rank: whose slices.
        ranks: of how many.

    Raises:
        UserError: as ``recipe_network``.
    """
    with built_in_slices(rank, ranks) as made:
        net = recipe_network(recipe, num_classes)
    net.made = made
    return net


def parts(recipe: Recipe) -> Iterator[Recipe]:
    """The runs that a recipe stands for, in order: itself, or one for each module that is trained on its own.

    Such a run has its own folder ``module-00`` ... and begins with the backbone that the previous one left.
    """
    options = recipe.method.options
    execution = options.execution
    if execution.kind != "one module at a time" or execution.module is not None:
        yield recipe
        return
    network = recipe.network
    backbone = networks.create(network.name, **network.args)
    folders = [
        Path(recipe.run_dir) / f"module-{module:02d}"
        for module in range(
            len(networks.cut(backbone, network.cut, network.stem_as_module, recipe.data.image_size))
        )
    ]
    for module, folder in enumerate(folders):
        begin = {"checkpoint_path": str(folders[module - 1] / "backbone.safetensors")} if module else {}
        yield replace(
            recipe,
            run_dir=str(folder),
            resume="auto"
            if module and recipe.resume != "never"
            else recipe.resume,  # a path is of the first one
            network=replace(network, args={**network.args, **begin}),
            method=replace(recipe.method, options=replace(options, module=module)),
        )
