"""AutoAugment and Cutout against torchvision, image by image from the same numbers."""

import math
from collections import Counter
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from cpmix_cli.data import augment
from cpmix_cli.data.autoaugment import NUM_UNIFORMS, POLICIES, AutoAugment
from cpmix_cli.data.batches import CropBatches, ImageBatches, Resident, make_batches
from cpmix_cli.data.dataset import unwritten_dataset
from cpmix_cli.recipe.schema import Data

CPU = torch.device("cpu")
SIZES = [(32, 32), (28, 28), (8, 8), (33, 47), (64, 64)]
THEIRS = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)


def torchvisions(image: Tensor, u: list[float], fill: int) -> Tensor:
    """The policy as torchvision does it, its draws taken from `u`: [channels, H, W] uint8."""
    policy = THEIRS._policies[int(u[0] * 25)]
    for slot, (name, probability, number) in enumerate(policy):
        if u[1 + slot] < probability:
            magnitudes, signed = THEIRS._AUGMENTATION_SPACE[name]
            found = magnitudes(10, *image.shape[1:])
            magnitude = 0.0 if found is None else float(found[number])
            magnitude *= -1 if signed and u[3 + slot] < 0.5 else 1
            image = THEIRS._apply_image_or_video_transform(image, name, magnitude, "nearest", {torch.Tensor: [fill]})
    return image


def drawn(policy: int, first: bool, second: bool, signs: tuple[bool, bool] = (False, False)) -> list[float]:
    """Uniforms of a sub-policy, of which the first, the second or both operations are done, with negative signs."""
    return [
        (policy + 0.5) / 25,
        *(0.0 if done else 1.0 for done in (first, second)),
        *(0.4 if s else 0.6 for s in signs),
    ]


def pictures(count: int, height: int, width: int, channels: int, generator: torch.Generator) -> Tensor:
    """Images of all kinds: noise, smooth ones, few grey levels, flat ones."""
    x = torch.randint(0, 256, (count, height, width, channels), dtype=torch.uint8, generator=generator)
    x[1::4] = x[1::4] // 3 + torch.linspace(0, 150, width).to(torch.uint8).view(1, 1, -1, 1)
    x[2::4] = x[2::4] // 90 * 85
    x[3::8] = x[3::8, :1, :1]
    return x


def by_torchvision(images: Tensor, uniforms: Tensor, fill: int) -> Tensor:
    found = [torchvisions(x.permute(2, 0, 1), u, fill) for x, u in zip(images, uniforms.tolist(), strict=True)]
    return torch.stack(found).permute(0, 2, 3, 1)


EVERY = [
    drawn(policy, first, second, (minus, other))
    for policy, first, second, minus, other in product(range(25), *[(False, True)] * 4)
]
"""The uniforms of every sub-policy, each operation done or not and of either sign."""


@pytest.mark.parametrize("fill", [0, 128])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_every_sub_policy_equals_torchvision(
    height: int, width: int, channels: int, fill: int, generator: torch.Generator
) -> None:
    """Every pixel of every image: at these sizes no source of a pixel is half-way between two."""
    uniforms = torch.tensor(EVERY, dtype=torch.float64)
    images = pictures(len(EVERY), height, width, channels, generator)
    found = AutoAugment(height, width, channels, fill, CPU)(images, uniforms)
    assert found.dtype == torch.uint8 and found.is_contiguous()
    assert found.equal(by_torchvision(images, uniforms, fill))


def test_drawn_sub_policies_equal_torchvision_and_do_not_depend_on_the_batch(generator: torch.Generator) -> None:
    uniforms = torch.rand(600, NUM_UNIFORMS, dtype=torch.float64, generator=generator)
    images = pictures(600, 32, 32, 3, generator)
    ours = AutoAugment(32, 32, 3, 0, CPU)
    found = ours(images, uniforms)
    assert found.equal(by_torchvision(images, uniforms, 0))
    assert found.equal(torch.cat([ours(x[None], u[None]) for x, u in zip(images, uniforms, strict=True)]))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 5), (3, 1)])
def test_tiny_images_equal_torchvision(size: tuple[int, int], generator: torch.Generator) -> None:
    uniforms = torch.tensor(EVERY, dtype=torch.float64)
    images = pictures(len(EVERY), *size, 3, generator)
    found = AutoAugment(*size, 3, 0, CPU)(images, uniforms)
    assert found.equal(by_torchvision(images, uniforms, 0))


def test_sub_policies_are_torchvisions() -> None:
    theirs = tuple(tuple((name, p, number or 0) for name, p, number in policy) for policy in THEIRS._policies)
    assert theirs == POLICIES


@pytest.mark.parametrize("name", ["Color", "Contrast", "Brightness"])
def test_colours_equal_torchvision_for_every_pair_of_values(name: str) -> None:
    """All red and green values, whose grey value meets its bounds exactly in many pixels."""
    red, green = torch.meshgrid(*[torch.arange(256, dtype=torch.uint8)] * 2, indexing="ij")
    images = torch.stack([torch.stack([red, green, torch.full_like(red, b)], 2) for b in (0, 10, 128, 250, 255)])
    ours = AutoAugment(256, 256, 3, 0, CPU)
    for policy, slot in ((p, s) for p in range(25) for s in range(2) if POLICIES[p][s][0] == name):
        for minus in (False, True):
            u = drawn(policy, slot == 0, slot == 1, (minus, minus))
            uniforms = torch.tensor([u] * len(images), dtype=torch.float64)
            assert ours(images, uniforms).equal(by_torchvision(images, uniforms, 0))


def test_flat_images_keep_their_value_under_autocontrast_and_equalize() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1).expand(256, 8, 8, 3)
    for policy in (4, 8):  # autocontrast and equalize, equalize twice
        uniforms = torch.tensor([drawn(policy, True, True)] * 256, dtype=torch.float64)
        assert AutoAugment(8, 8, 3, 0, CPU)(images, uniforms).equal(images)


def test_sub_policies_signs_and_operations_have_their_frequencies() -> None:
    """Of 20,000 images: chi-squared of 25 sub-policies; and each operation as often as its probability says."""
    generator = torch.Generator().manual_seed(1)
    uniforms = torch.rand(20_000, NUM_UNIFORMS, dtype=torch.float64, generator=generator)
    images = torch.zeros(20_000, 9, 9, 1, dtype=torch.uint8)
    images[:, 4, 4] = 255
    found = AutoAugment(9, 9, 1, 1, CPU)(images, uniforms)
    policies = torch.bincount((uniforms[:, 0] * 25).long(), minlength=25).double()
    assert ((policies - 800) ** 2 / 800).sum() < 43  # 99 % point of chi-squared with 24 degrees of freedom
    of_shift = (uniforms[:, 0] * 25).long() == 24  # TranslateY9 at 0.7 by 4 pixels, then AutoContrast
    rows = (found[of_shift, :, 4, 0] == 255).int().argmax(1)
    shares = Counter(rows.tolist())
    total = int(of_shift.sum())
    assert sorted(shares) == [0, 4, 8]
    assert shares[4] / total == pytest.approx(0.3, abs=0.05)
    assert shares[0] / total == pytest.approx(0.35, abs=0.05)
    changed = (found != images).flatten(1).any(1)
    assert 0 < int(changed.sum()) < 20_000


def batches(images: Tensor, **keys: Any) -> Resident:
    record = unwritten_dataset("x", [1], list(images.shape[1:]), recipe="", rho=None, storage="tensors").record
    return make_batches(images, Data(normalisation="none", **keys), record)


AUTOAUGMENT = {"augment": "crop-flip-autoaugment", "padding": 2}


@pytest.mark.parametrize("channels", [1, 3])
def test_images_that_draw_no_operation_are_cropped_and_flipped_as_without(
    channels: int, generator: torch.Generator
) -> None:
    images = pictures(20, 8, 8, channels, generator)
    ours, plain = batches(images, **AUTOAUGMENT), batches(images, augment="crop-flip", padding=2)
    assert (ours.num_uniforms, plain.num_uniforms) == (8, 3)
    indices = torch.randint(0, 20, (50,), generator=generator)
    uniforms = torch.rand(50, 8, dtype=torch.float64, generator=generator)
    uniforms[:, 4:6] = 1.0
    found = ours.batch(indices, uniforms)
    assert found.equal(plain.batch(indices, uniforms[:, :3]))
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert ours.plain(indices).equal(plain.plain(indices))


def test_autoaugment_follows_crop_and_flip_and_cutout_follows_it(generator: torch.Generator) -> None:
    images = pictures(20, 8, 8, 3, generator)
    ours = batches(images, **AUTOAUGMENT, fill=128, cutout=4)
    plain = batches(images, augment="crop-flip", padding=2)
    assert ours.num_uniforms == 10
    indices = torch.randint(0, 20, (200,), generator=generator)
    uniforms = torch.rand(200, 10, dtype=torch.float64, generator=generator)
    cropped = plain.batch(indices, uniforms[:, :3]).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)
    expected = by_torchvision(cropped, uniforms[:, 3:8], 128)
    for x, u in zip(expected, uniforms[:, 8:].tolist(), strict=True):
        x[naive_cutout(u, 4, 8, 8)] = 0
    found = ours.batch(indices, uniforms).permute(0, 2, 3, 1)
    torch.testing.assert_close(found, expected.float() / 255)


# -- Cutout ------------------------------------------------------------------------------------------------------------


def naive_cutout(u: list[float], side: int, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of the square, as the code of Cutout's authors clips it."""
    y, x = math.floor(u[0] * height), math.floor(u[1] * width)
    first = max(y - side // 2, 0), max(x - side // 2, 0)
    last = min(y - side // 2 + side, height), min(x - side // 2 + side, width)
    return slice(first[0], last[0]), slice(first[1], last[1])


@pytest.mark.parametrize(("side", "height", "width"), [(16, 32, 32), (1, 4, 4), (5, 7, 12), (8, 8, 8)])
def test_cutout_is_a_clipped_square_about_every_pixel(side: int, height: int, width: int) -> None:
    uniforms = torch.cartesian_prod(
        (torch.arange(height, dtype=torch.float64) + 0.5) / height,
        (torch.arange(width, dtype=torch.float64) + 0.5) / width,
    )
    found = augment.cutout(uniforms, side, height, width)
    for mask, u in zip(found, uniforms.tolist(), strict=True):
        expected = torch.zeros(height, width, dtype=torch.bool)
        expected[naive_cutout(u, side, height, width)] = True
        assert mask.equal(expected)
    if side == 16:  # the sides are 8 to 16 pixels
        areas = found.sum((1, 2))
        assert (int(areas.min()), int(areas.max())) == (64, 256)
        assert float(areas.double().mean()) / 1024 == pytest.approx(0.191, abs=5e-4)


def test_cutout_of_resized_crops_is_black_before_normalisation(generator: torch.Generator) -> None:
    images = torch.randint(1, 256, (6, 20, 20, 3), dtype=torch.uint8, generator=generator)
    for kind in ("resized-crop-flip", "resized-crop-flip-jitter"):
        recipe = Data(augment=kind, crop=10, normalisation="imagenet", cutout=4)
        ours = CropBatches(images, recipe, [], [])
        plain = CropBatches(images, recipe.model_copy(update={"cutout": 0}), [], [])
        assert ours.num_uniforms == plain.num_uniforms + 2
        uniforms = torch.rand(30, ours.num_uniforms, dtype=torch.float64, generator=generator)
        indices = torch.arange(30) % 6
        expected = plain.batch(indices, uniforms[:, :-2]).clone()
        black = -torch.tensor([0.485, 0.456, 0.406]) / torch.tensor([0.229, 0.224, 0.225])
        for x, u in zip(expected, uniforms[:, -2:].tolist(), strict=True):
            x[:, *naive_cutout(u, 4, 10, 10)] = black.view(3, 1, 1)
        torch.testing.assert_close(ours.batch(indices, uniforms), expected)


def test_older_recipes_draw_as_many_numbers_as_before() -> None:
    """Else their results would change."""
    images = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    expected = {"crop-flip-rotate": 3, "crop-flip": 3, "crop": 3, "none": 3}
    assert {
        kind: ImageBatches(images, Data(augment=kind), [0.0] * 3, [1.0] * 3).num_uniforms for kind in expected
    } == expected
    crops = {"resized-crop-flip": 23, "resized-crop-flip-jitter": 27, "none": 0}
    assert {
        kind: CropBatches(images, Data(augment=kind, crop=4), [0.0] * 3, [1.0] * 3).num_uniforms for kind in crops
    } == crops
