"""Model FLOPs utilization: what a training computes of what its GPUs could."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import NamedTuple

from framework.config.recipe import Recipe
from framework.cost.counting import step_flops

logger = logging.getLogger(__name__)


class Peak(NamedTuple):
    """Dense TFLOP/s of a GPU, without sparsity; matrix products in 16 bits accumulate in float32.

    Attributes:
        half: in bfloat16 and float16.
        single: in TF32, which PyTorch takes for float32 convolutions where a GPU has it, or else in float32.
        bfloat16: whether bfloat16 is as fast as float16.
    """

    half: float
    single: float
    bfloat16: bool = True


# By what stands in torch.cuda.get_device_name(), the first that fits; from NVIDIA's data sheets.
PEAKS = {
    "GB200": Peak(2500, 1250),
    "B200": Peak(2250, 1125),
    "GH200": Peak(989, 495),
    "H200 NVL": Peak(835, 418),
    "H200": Peak(989, 495),
    "H100 NVL": Peak(835, 418),
    "H100 PCIe": Peak(756, 378),
    "H100": Peak(989, 495),
    "H800 PCIe": Peak(756, 378),
    "H800": Peak(989, 495),
    "H20": Peak(148, 74),
    "A100": Peak(312, 156),
    "A800": Peak(312, 156),
    "A40": Peak(149.7, 74.8),
    "A30": Peak(165, 82),
    "A10G": Peak(70, 35),
    "A10": Peak(125, 62.5),
    "L40S": Peak(362, 183),
    "L40": Peak(181, 90.5),
    "L4": Peak(121, 60.5),
    "RTX 6000 Ada": Peak(364, 182),
    "RTX A6000": Peak(154.8, 77.4),
    "RTX 5090": Peak(209.5, 104.8),
    "RTX 4090": Peak(165.2, 82.6),
    "RTX 3090": Peak(71, 35.6),
    "V100-PCIE": Peak(112, 14, bfloat16=False),
    "V100": Peak(125, 15.7, bfloat16=False),
    "T4": Peak(65, 8.1, bfloat16=False),
}

# A slice of a GPU, and others that are called like one above.
OTHERS = {"MIG", "Laptop", "Ti", "SUPER", "D"}


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s of a GPU at a recipe's ``train.precision``; ``None`` if it is not known.

    Args:
        device_name: as ``torch.cuda.get_device_name`` gives it.
        precision: "fp32", "bf16" or "fp16".
    """
    words = device_name.replace("-", " ").split()
    if OTHERS & set(words):
        return None
    for name, peak in PEAKS.items():
        if f" {name.replace('-', ' ')} " in f" {' '.join(words)} ":
            if precision == "bf16" and not peak.bfloat16:
                return None
            return 1e12 * (peak.single if precision == "fp32" else peak.half)
    return None


@dataclass(frozen=True)
class Utilization:
    """The share of the GPUs' peak that the arithmetic of training takes.

    Attributes:
        flops: of training on one image in all its views: forward, heads, teacher and gradients, a multiply-add as two.
        peak: FLOP/s of all GPUs together.
    """

    flops: float
    peak: float

    def at(self, images_per_second: float) -> float:
        """The share, between 0 and 1, at this speed."""
        return images_per_second * self.flops / self.peak


def utilization(recipe: Recipe, num_classes: int, device_name: str, devices: int) -> Utilization | None:
    """Count a recipe's step, which takes seconds; ``None`` on a device whose peak is not known.

    What the batch of one rank's micro-batch does is counted; that contrasts see images of other ranks is left out.

    Args:
        recipe: of the run.
        num_classes: of the data.
        device_name: as ``peak_flops`` takes it.
        devices: how many work together.
    """
    peak = peak_flops(device_name, recipe.train.precision)
    if peak is None:
        return None
    network = replace(recipe.network, args=recipe.network.architecture)
    images = max(1, recipe.train.batch_size * recipe.pipeline.stages // (recipe.micro_batches * devices))
    try:
        flops = step_flops(replace(recipe, network=network), num_classes, images)
    except Exception as error:  # an own network may ask for values, which counting has none of
        logger.warning("no FLOPs utilization: the step can't be counted: %s", " ".join(str(error).split()))
        return None
    return Utilization(flops / images, peak * devices)
