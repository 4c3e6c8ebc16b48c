"""Batched augmentation against a loop over images."""

from typing import Any

import pytest
import torch
from torchvision.transforms.v2.functional import rotate

from cpmix_cli.data.batches import ClassPool, ImageBatches, PointBatches
from cpmix_cli.recipe.schema import Data


def naive(image: torch.Tensor, row: int, column: int, flip: bool, padding: int) -> torch.Tensor:
    """One image padded with black, cropped at (row, column), flipped: [H, W, channels]."""
    height, width, _channels = image.shape
    out = torch.zeros_like(image)
    for i in range(height):
        for j in range(width):
            y, x = i + row - padding, (width - 1 - j if flip else j) + column - padding
            if 0 <= y < height and 0 <= x < width:
                out[i, j] = image[y, x]
    return out


def test_crop_flip_and_normalisation_equal_a_plain_loop(generator: torch.Generator) -> None:
    images = torch.randint(0, 256, (6, 5, 7, 3), dtype=torch.uint8, generator=generator)
    mean, std = [0.1, 0.5, 0.7], [0.2, 0.3, 0.4]
    recipe = Data(augment="crop-flip", padding=2, normalisation="dataset")
    batches = ImageBatches(images, recipe, mean, std)
    indices = torch.randint(0, 6, (40,), generator=generator)
    uniforms = torch.rand(40, 3, dtype=torch.float64, generator=generator)
    found = batches.batch(indices, uniforms)
    assert found.is_contiguous(memory_format=torch.channels_last)
    for i, u, x in zip(indices.tolist(), uniforms.tolist(), found, strict=True):
        cropped = naive(images[i], int(u[0] * 5), int(u[1] * 5), u[2] < 0.5, 2).float() / 255
        expected = (cropped - torch.tensor(mean)) / torch.tensor(std)
        torch.testing.assert_close(x.permute(1, 2, 0), expected)


def test_images_turn_as_torchvision_turns_them(generator: torch.Generator) -> None:
    """The same pixels, black where there are none; the angle is what the flip leaves of its number."""
    images = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8, generator=generator)
    batches = ImageBatches(images, Data(augment="crop-flip-rotate", padding=0, normalisation="none"), [], [])
    for angle in (-15.0, -7.3, -0.4, 0.0, 3.3, 11.1, 14.9):
        part = (angle / 15 + 1) / 4
        for number, image in ((0.5 + part, images), (part, images.flip(2))):
            found = batches.batch(torch.tensor([0]), torch.tensor([[0.0, 0.0, number]], dtype=torch.float64))
            expected = rotate(image.permute(0, 3, 1, 2).float() / 255, angle)
            torch.testing.assert_close(found, expected)


def test_a_constant_channel_is_not_divided_by_zero() -> None:
    images = torch.full((2, 3, 3, 1), 51, dtype=torch.uint8)
    found = ImageBatches(images, Data(padding=0), [0.2], [0.0]).plain(torch.tensor([0, 1]))
    torch.testing.assert_close(found, torch.zeros(2, 1, 3, 3))


def test_plain_images_are_whole_and_unflipped(generator: torch.Generator) -> None:
    images = torch.randint(0, 256, (4, 3, 3, 1), dtype=torch.uint8, generator=generator)
    batches = ImageBatches(images, Data(padding=1), [0.0], [1.0])
    found = batches.plain(torch.tensor([2, 0]))
    torch.testing.assert_close(found.permute(0, 2, 3, 1), images[[2, 0]].float() / 255)


def test_every_offset_and_both_directions_occur() -> None:
    image = torch.arange(1, 10, dtype=torch.uint8).view(1, 3, 3, 1)
    steps = torch.linspace(0, 1 - 1e-9, 30, dtype=torch.float64)
    uniforms = torch.cartesian_prod(steps, steps, torch.tensor([0.1, 0.9], dtype=torch.float64))
    for augment, count in (("crop-flip", 18), ("crop", 9), ("none", 1)):
        batches = ImageBatches(image, Data(augment=augment, padding=1), [0.0], [1.0])
        found = batches.batch(torch.zeros(len(uniforms), dtype=torch.int64), uniforms)
        assert len(found.flatten(1).unique(dim=0)) == count, augment


@pytest.mark.parametrize(
    ("normalisation", "expected"),
    [
        ("none", [0.2, 0.4, 1.0]),
        ("dataset", [(0.2 - 0.5) / 0.25, (0.4 - 0.25) / 0.5, 0.0]),
        ("cifar10", [(0.2 - 0.4914) / 0.2023, (0.4 - 0.4822) / 0.1994, (1.0 - 0.4465) / 0.2010]),
        ("imagenet", [(0.2 - 0.485) / 0.229, (0.4 - 0.456) / 0.224, (1.0 - 0.406) / 0.225]),
    ],
)
def test_normalisation_subtracts_mean_and_divides_by_deviation(normalisation: Any, expected: list[float]) -> None:
    image = torch.tensor([51, 102, 255], dtype=torch.uint8).expand(1, 2, 2, 3)
    recipe = Data(augment="none", normalisation=normalisation)
    x = ImageBatches(image, recipe, [0.5, 0.25, 1.0], [0.25, 0.5, 0.1]).plain(torch.tensor([0]))
    torch.testing.assert_close(x[0, :, 1, 0], torch.tensor(expected))


def test_points_are_returned_unchanged() -> None:
    points = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    batches = PointBatches(points)
    assert batches.batch(torch.tensor([1, 1]), torch.zeros(2, 3)).tolist() == [[3, 4], [3, 4]]


def test_pool_draws_uniformly_within_classes(generator: torch.Generator) -> None:
    labels = torch.tensor([2, 0, 2, 1, 2, 0])
    pool = ClassPool(labels, 3)
    classes = torch.tensor([0, 0, 1, 2, 2, 2])
    below_one = 1 - 2.0**-53
    uniforms = torch.tensor([0.0, 0.5, below_one, 0.0, 0.34, below_one], dtype=torch.float64)
    assert pool.draw(classes, uniforms).tolist() == [1, 5, 3, 0, 2, 4]
    many = pool.draw(torch.full((9000,), 2), torch.rand(9000, dtype=torch.float64, generator=generator))
    found = torch.bincount(many, minlength=6) / 9000
    assert found[[1, 3, 5]].sum() == 0
    torch.testing.assert_close(found[[0, 2, 4]], torch.full((3,), 1 / 3), atol=0.03, rtol=0)
