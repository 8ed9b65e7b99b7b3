"""Views against torchvision: every operation on equal parameters, every parameter by its distribution."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as F
from PIL import Image
from scipy import stats
from torchvision.transforms import ColorJitter, RandomResizedCrop

from framework.config.views import Views
from framework.data.augment import color
from framework.data.augment.crops import random_box, resized, resized_batch, shifted_batch
from framework.data.augment.views import (
    augment_params,
    blur_taps,
    crop_view,
    draw_uniforms,
    finish_views,
)
from framework.data.loading.decode import BrokenImage, decode
from framework.runtime.errors import UserError

CPU = torch.device("cpu")


def random_images(n: int, side: int) -> torch.Tensor:
    images = torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0))
    images[0] = 0.5  # no hue
    images[1, :, : side // 2] = 0  # black
    images[2, 1] = images[2, 0]  # ties between channels
    return images


def photograph(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def draws(n: int) -> np.ndarray:
    return draw_uniforms(0, 0, 0, 0, n)


def encoded(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("operation", "reference", "factors"),
    [
        (color.brightness, F.adjust_brightness, [0.0, 0.2, 1.0, 1.8]),
        (color.contrast, F.adjust_contrast, [0.0, 0.2, 1.0, 1.8]),
        (color.saturation, F.adjust_saturation, [0.0, 0.2, 1.0, 1.8]),
        (color.hue, F.adjust_hue, [-0.5, -0.21, 0.0, 0.2]),
    ],
)
def test_color_operation_equals_torchvision(operation, reference, factors):
    images = random_images(8, 13)
    factor = torch.tensor(factors * 2)
    expected = torch.stack([reference(image, float(f)) for image, f in zip(images, factor, strict=True)])
    torch.testing.assert_close(operation(images, factor.view(-1, 1, 1, 1)), expected, atol=1e-5, rtol=0)


def test_gray_equals_torchvision():
    images = random_images(4, 9)
    torch.testing.assert_close(color.gray(images), F.rgb_to_grayscale(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kernel", [1, 3, 9, 23])
def test_blur_equals_torchvision(kernel):
    images = random_images(5, 24)
    sigma = torch.tensor([0.1, 0.5, 1.0, 1.7, 2.0])
    expected = [
        F.gaussian_blur(image, [kernel] * 2, [float(s)] * 2) for image, s in zip(images, sigma, strict=True)
    ]
    torch.testing.assert_close(color.blur(images, sigma, kernel), torch.stack(expected), atol=1e-5, rtol=0)


def test_solarize_equals_torchvision():
    images = random_images(4, 9)
    expected = F.solarize(images, 128 / 255)
    torch.testing.assert_close(color.solarize(images), expected, atol=1e-6, rtol=0)
    levels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    assert torch.equal((color.solarize(levels / 255) * 255).round().byte(), F.solarize(levels, 128))


def test_jitter_takes_each_image_in_its_own_order():
    orders = [*itertools.permutations(range(4)), (-1, -1, -1, -1)]
    images = random_images(len(orders), 7)
    generator = torch.Generator().manual_seed(1)
    factors = torch.rand(len(orders), 4, generator=generator) * torch.tensor([1.6, 1.6, 1.6, 0.4])
    factors += torch.tensor([0.2, 0.2, 0.2, -0.2])
    operations = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    expected = []
    for image, order, factor in zip(images, orders, factors.tolist(), strict=True):
        for operation in order:
            image = image if operation < 0 else operations[operation](image, factor[operation])
        expected.append(image)
    found = color.jitter(images.clone(), torch.tensor(orders), factors)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=0)


def test_finish_equals_torchvision_chain():
    views = Views(solarize=0.2)
    params = augment_params(views, draws(64))
    pixels = (random_images(64, 20) * 255).to(torch.uint8)
    operations = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    expected = []
    for n, image in enumerate(F.to_dtype(pixels, torch.float32, scale=True)):
        image = F.horizontal_flip(image) if params.flip[n] else image
        for operation in params.order[n].tolist():
            if operation >= 0:
                image = operations[operation](image, float(params.factors[n, operation]))
        image = F.rgb_to_grayscale(image, 3) if params.grayscale[n] else image
        if params.sigma[n] > 0:
            image = F.gaussian_blur(image, [3, 3], [float(params.sigma[n])] * 2)
        image = F.solarize(image, 128 / 255) if params.solarize[n] else image
        expected.append(F.normalize(image, list(views.mean), list(views.std)))
    found = finish_views(views, pixels, params, CPU)
    assert blur_taps(views.blur_kernel, 20) == 3
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=0)  # 1e-5 before division by std
    assert finish_views(views, pixels, params, CPU, torch.bfloat16).dtype == torch.bfloat16


def test_kinds_without_color_only_flip_and_normalize():
    pixels = (random_images(40, 8) * 255).to(torch.uint8)
    for kind, flips in (("supervised", True), ("cifar", True), ("none", False)):
        views = Views(kind=kind, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        params = augment_params(views, draws(40))
        assert params.flip.any() == flips
        expected = torch.where(params.flip.view(-1, 1, 1, 1), pixels.flip(-1), pixels) / 255
        assert torch.equal(finish_views(views, pixels, params, CPU), expected)


@pytest.mark.parametrize("size", [(100, 60), (40, 300), (9, 8)])
def test_crop_boxes_are_distributed_as_torchvisions(size):
    width, height = size
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    ours = np.array(
        [random_box(width, height, (0.08, 1.0), (3 / 4, 4 / 3), draw[:40]) for draw in draws(2000)]
    )
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(2000)])
    left, upper, right, lower = ours.T
    assert left.min() >= 0
    assert upper.min() >= 0
    assert right.max() <= width
    assert lower.max() <= height
    pairs = (
        (upper, theirs[:, 0]),
        (left, theirs[:, 1]),
        (lower - upper, theirs[:, 2]),
        (right - left, theirs[:, 3]),
    )
    for mine, other in pairs:
        assert stats.ks_2samp(mine, other).pvalue > 1e-3


def test_jitter_parameters_are_distributed_as_torchvisions():
    views = Views()
    params = augment_params(views, draws(3000))
    torch.manual_seed(0)
    reference = ColorJitter(0.8, 0.8, 0.8, 0.2)
    arguments = (reference.brightness, reference.contrast, reference.saturation, reference.hue)
    theirs = [reference.get_params(*arguments) for _ in range(3000)]
    for operation in range(4):
        other = np.array([parameters[1 + operation] for parameters in theirs])
        assert stats.ks_2samp(params.factors[:, operation].numpy(), other).pvalue > 1e-3
    jittered = params.order[params.order[:, 0] >= 0]
    names, counts = np.unique(jittered.numpy(), axis=0, return_counts=True)
    assert len(names) == 24
    assert stats.chisquare(counts).pvalue > 1e-3


def test_probabilities_and_blur_range():
    params = augment_params(Views(solarize=0.1), draws(4000))
    for mask, probability in (
        (params.flip, 0.5),
        (params.order[:, 0] >= 0, 0.8),
        (params.grayscale, 0.2),
        (params.sigma > 0, 0.5),
        (params.solarize, 0.1),
    ):
        assert stats.binomtest(int(mask.sum()), 4000, probability).pvalue > 1e-3
    sigma = params.sigma[params.sigma > 0].numpy()
    assert stats.kstest(sigma, stats.uniform(0.1, 1.9).cdf).pvalue > 1e-3
    strong = augment_params(Views(jitter=(1.5, 0.0, 0.0, 0.0)), draws(1000)).factors
    assert strong[:, 0].min() >= 0
    assert (strong[:, 1:] == torch.tensor([1.0, 1.0, 0.0])).all()


def test_fields_switch_their_operation_off_and_leave_the_others_alone():
    full = augment_params(Views(), draws(200))
    quiet = augment_params(Views(flip=0, jitter_probability=0, blur=0), draws(200))
    assert not quiet.flip.any()
    assert (quiet.order == -1).all()
    assert not quiet.sigma.any()
    assert torch.equal(quiet.grayscale, full.grayscale)


def test_every_view_has_its_own_probabilities():
    """Barlow Twins' and BYOL's views; what lists don't name is as without them."""
    both = np.stack([draw_uniforms(0, 0, view, 0, 2000) for view in range(2)])
    params = augment_params(Views(blur=(1.0, 0.1), solarize=(0.0, 0.2), jitter_strength=(0.0, 1.0)), both)
    for view, (blur, solarize, strength) in enumerate(((1.0, 0.0, 0.0), (0.1, 0.2, 1.0))):
        alone = augment_params(Views(blur=blur, solarize=solarize, jitter_strength=strength), both[view])
        for field, other in zip(params, alone, strict=True):
            assert torch.equal(field[2000 * view :][:2000], other)
    assert bool((params.sigma[:2000] > 0).all())
    with pytest.raises(UserError, match=r"views.blur=\[1.0, 0.1\]: must be a number, or one for each"):
        augment_params(Views(blur=(1.0, 0.1)), np.zeros((3, 1, 54)))


def test_uniforms_depend_on_each_key():
    base = draw_uniforms(1, 2, 3, 4, 1)
    assert np.array_equal(base, draw_uniforms(1, 2, 3, 4, 1))
    assert base.min() >= 0
    assert base.max() < 1
    for other in ((0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0), (1, 2, 4, 4)):
        assert not np.isin(draw_uniforms(*other, 1), base).any()


def test_uniforms_of_a_position_do_not_depend_on_the_call():
    several = draw_uniforms(1, 2, 3, 4, 5)
    assert len(np.unique(several)) == several.size
    for row in range(5):
        assert np.array_equal(draw_uniforms(1, 2, 3, 4 + row, 1)[0], several[row])


def test_random_crop_equals_torchvision():
    image = F.pil_to_tensor(photograph(90, 61))
    for draw in draws(5):
        left, upper, right, lower = random_box(90, 61, (0.08, 1.0), (3 / 4, 4 / 3), draw[:40])
        expected = F.resized_crop(
            image, upper, left, lower - upper, right - left, [24, 24], T.InterpolationMode.BICUBIC
        )
        assert torch.equal(crop_view(Views(), image, 24, draw), expected)


@pytest.mark.parametrize("size", [(90, 61), (61, 90), (8, 8)])
def test_central_crop_equals_torchvision(size):
    image = F.pil_to_tensor(photograph(*size))
    reference = T.Compose([T.Resize(37, T.InterpolationMode.BICUBIC), T.CenterCrop(32)])
    found = crop_view(Views(kind="none", center=32 / 37), image, 32, draws(1)[0])
    assert torch.equal(found, reference(image))


@pytest.mark.parametrize(("edge", "mode"), [("reflect", "reflect"), ("zeros", "constant")])
def test_padded_crop_reaches_every_offset_of_the_widened_image(edge, mode):
    image = F.pil_to_tensor(photograph(6, 6))
    padded = F.pad(image, [1, 1, 1, 1], padding_mode=mode)
    windows = {padded[:, y : y + 6, x : x + 6].numpy().tobytes() for y in range(3) for x in range(3)}
    views = Views(kind="cifar", pad=1, edge=edge)
    assert {crop_view(views, image, 6, draw).numpy().tobytes() for draw in draws(100)} == windows
    assert crop_view(Views(kind="cifar"), image, 32, draws(1)[0]).shape == (3, 32, 32)


def test_batched_crops_equal_single_ones():
    generator = np.random.default_rng(0)
    images = torch.from_numpy(generator.integers(0, 256, (40, 3, 31, 45), np.uint8))
    boxes = [random_box(45, 31, (0.02, 1.0), (0.5, 2.0), draw[:40]) for draw in draws(40)]
    for size in (8, 32, 60):
        found = resized_batch(images, torch.tensor(boxes), size).int()
        expected = [resized(image, box, (size, size)) for image, box in zip(images, boxes, strict=True)]
        difference = (found - torch.stack(expected).int()).abs()
        assert difference.max() <= 2
        assert (difference > 1).float().mean() < 1e-3


def test_batched_shifts_equal_single_ones():
    images = torch.arange(5 * 3 * 16, dtype=torch.uint8).view(5, 3, 4, 4)
    boxes = torch.tensor([[x, 1 - x, x + 4, 5 - x] for x in range(-2, 3)])
    for edge in ("reflect", "zeros"):
        single = [shifted_batch(images[i : i + 1], boxes[i : i + 1], edge)[0] for i in range(5)]
        assert torch.equal(shifted_batch(images, boxes, edge), torch.stack(single))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_decode_gives_rgb(mode):
    image = photograph(20, 10).convert("RGB").convert(mode)
    found = decode(encoded(image, "jpeg" if mode == "CMYK" else "png"))
    assert (found.dtype, tuple(found.shape)) == (torch.uint8, (3, 10, 20))
    if mode == "L":
        assert np.array_equal(found[1], np.asarray(image))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30, "subsampling": 0}])
def test_jpeg_decodes_as_pillow_decodes_it(mode, options):
    buffer = io.BytesIO()
    photograph(67, 45).convert(mode).save(buffer, "jpeg", **options)
    expected = F.pil_to_tensor(Image.open(buffer).convert("RGB"))
    assert torch.equal(decode(buffer.getvalue()), expected)


def test_decode_refuses_what_is_no_8_bit_image():
    deep = Image.fromarray(np.full((4, 4), 30000, np.uint16))
    whole = encoded(photograph(64, 64), "jpeg")
    bad = ((b"", "empty"), (b"text", "no known"), (encoded(deep, "png"), "8 bits"), (whole[:700], "runcated"))
    for data, reason in bad:
        with pytest.raises(BrokenImage, match=reason):
            decode(data)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"area": (0.5, 0.2)}, "area must be"),
        ({"area": (0.5, 1.2)}, "at most 1"),
        ({"blur_sigma": (0.0, 1.0)}, "blur_sigma must be"),
        ({"jitter_strength": 3.0}, "hue"),
        ({"jitter_strength": (1.0, 3.0)}, "hue"),
        ({"center": 0.0}, "center"),
    ],
)
def test_impossible_fields_are_refused(fields, problem):
    with pytest.raises(ValueError, match=problem):
        Views(**fields)
