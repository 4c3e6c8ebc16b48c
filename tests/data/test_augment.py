"""Batched augmentation against torchvision, image by image from the same numbers."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as v2

from cpmix_cli.data import augment


def naive_box(u: list[float], height: int, width: int) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop.get_params, its draws taken from `u`."""
    area = height * width
    log_ratio = math.log(3 / 4), math.log(4 / 3)
    for k in range(10):
        target = area * (0.08 + u[2 * k] * (1.0 - 0.08))
        aspect = math.exp(log_ratio[0] + u[2 * k + 1] * (log_ratio[1] - log_ratio[0]))
        w = round(math.sqrt(target * aspect))
        h = round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return math.floor(u[20] * (height - h + 1)), math.floor(u[21] * (width - w + 1)), h, w
    if width / height < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif width / height > 4 / 3:
        h, w = height, round(height * (4 / 3))
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


SIZES = [(256, 256), (375, 500), (500, 333), (1, 1), (1, 90), (70, 1), (2, 300), (20, 64), (11, 14)]


def drawn(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(count, augment.NUM_JITTER, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_crop_boxes_equal_those_of_torchvision(height: int, width: int, generator: torch.Generator) -> None:
    uniforms = drawn(400, generator)
    uniforms[:3] = torch.tensor([0.0, 1 - 2.0**-53, 0.5], dtype=torch.float64)[:, None]
    boxes = augment.crop_boxes(uniforms, height, width)
    assert boxes.tolist() == [list(naive_box(u, height, width)) for u in uniforms.tolist()]
    top, left, h, w = boxes.unbind(1)
    assert (torch.stack([top, left]) >= 0).all()
    assert (torch.stack([h, w]) > 0).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()


def test_boxes_in_the_middle_and_at_random_both_occur(generator: torch.Generator) -> None:
    """Of a long strip no try fits mostly; of a square the first does mostly."""
    strip = augment.crop_boxes(drawn(200, generator), 2, 300)
    assert 0 < (strip[:, 1] == (300 - 3) // 2).sum() <= 200
    square = augment.crop_boxes(drawn(200, generator), 256, 256)
    shares = (square[:, 2] * square[:, 3]).double() / 256**2
    assert 0.08 < float(shares.min()) < 0.15
    assert 0.8 < float(shares.max()) <= 1
    assert abs(float(shares.mean()) - 0.54) < 0.08


def resized(image: torch.Tensor, box: list[int], size: int) -> torch.Tensor:
    top, left, height, width = box
    pixels = image.permute(2, 0, 1).float()
    return v2.resized_crop(pixels, top, left, height, width, [size, size], antialias=True)


@pytest.mark.parametrize(("side", "size"), [(256, 224), (64, 64), (40, 56), (300, 32), (32, 1), (1, 8)])
def test_resized_crops_equal_those_of_torchvision(side: int, size: int, generator: torch.Generator) -> None:
    images = torch.randint(0, 256, (24, side, side, 3), dtype=torch.uint8, generator=generator)
    boxes = augment.crop_boxes(drawn(24, generator), side, side)
    boxes[0] = torch.tensor([0, 0, side, side])
    boxes[1] = torch.tensor([side - 1, side - 1, 1, 1])
    boxes[2] = torch.tensor([0, 0, 1, side])
    flip = torch.arange(24) % 2 == 1
    found = augment.resized_crop(images, boxes, size, flip)
    for image, box, turned, x in zip(images, boxes.tolist(), flip.tolist(), found, strict=True):
        expected = resized(image, box, size)
        torch.testing.assert_close(x, expected.flip(2) if turned else expected, atol=0.02, rtol=0)


def test_a_crop_of_the_whole_at_its_own_size_changes_nothing(generator: torch.Generator) -> None:
    images = torch.randint(0, 256, (2, 30, 30, 3), dtype=torch.uint8, generator=generator)
    boxes = torch.tensor([[0, 0, 30, 30]] * 2)
    found = augment.resized_crop(images, boxes, 30, torch.tensor([False, True]))
    expected = images.permute(0, 3, 1, 2).float()
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1].flip(2))


def naive_jitter(image: torch.Tensor, u: list[float]) -> torch.Tensor:
    adjust = (v2.adjust_brightness, v2.adjust_contrast, v2.adjust_saturation)
    for what in augment.ORDERS[int(u[26] * 6)]:
        image = adjust[what](image, 1 + 0.4 * (2 * u[23 + what] - 1))
    return image


@pytest.mark.parametrize("channels", [3, 1])
def test_jitter_equals_that_of_torchvision(channels: int, generator: torch.Generator) -> None:
    x = torch.rand(60, channels, 9, 7, generator=generator)
    uniforms = drawn(60, generator)
    uniforms[0] = 0
    uniforms[1] = 1 - 2.0**-53
    found = augment.jittered(x * 255, uniforms, torch.tensor(augment.ORDERS)) / 255
    for image, u, y in zip(x, uniforms.tolist(), found, strict=True):
        torch.testing.assert_close(y, naive_jitter(image, u), atol=2e-6, rtol=0)
    assert len({int(u * 6) for u in uniforms[:, 26].tolist()}) == 6


def test_jitter_factors_of_one_change_nothing(generator: torch.Generator) -> None:
    x = 255 * torch.rand(6, 3, 5, 5, generator=generator)
    uniforms = drawn(6, generator)
    uniforms[:, augment.FACTORS : augment.ORDER] = 0.5
    torch.testing.assert_close(augment.jittered(x.clone(), uniforms, torch.tensor(augment.ORDERS)), x)


@pytest.mark.parametrize(("height", "width", "size"), [(256, 256, 224), (9, 8, 5), (7, 7, 7), (10, 10, 7)])
def test_the_middle_equals_the_centre_crop_of_torchvision(height: int, width: int, size: int) -> None:
    images = torch.from_numpy(np.arange(height * width).reshape(1, height, width, 1) % 251)
    expected = v2.center_crop(images.permute(0, 3, 1, 2), [size, size]).permute(0, 2, 3, 1)
    assert augment.middle(images, size).equal(expected)


def test_augmentation_never_reads_values_from_the_device(generator: torch.Generator) -> None:
    """On the meta device there are no values that could be looked at."""
    kinds: Any = {"device": "meta"}
    uniforms = torch.empty(5, augment.NUM_JITTER, dtype=torch.float64, **kinds)
    boxes = augment.crop_boxes(uniforms, 40, 40)
    images = torch.empty(5, 40, 40, 3, dtype=torch.uint8, **kinds)
    x = augment.resized_crop(images, boxes, 32, augment.flips(uniforms))
    x = augment.jittered(x, uniforms, torch.empty(6, 3, dtype=torch.int64, **kinds))
    assert x.shape == (5, 3, 32, 32)
