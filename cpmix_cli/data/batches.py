"""Batches from a resident data set: gather, augment and normalise as batched tensor code on the device.

One interface for all data: batch(indices [B], uniforms [B, 3]) -> inputs. Images stay uint8 until a batch is made.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cpmix_cli.recipe import Data

PUBLISHED = {  # mean and standard deviation of red, green, blue on the scale 0..1
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
NUM_UNIFORMS = 3  # a row, a column and a flip for each image


class Batches(Protocol):
    """What the engine asks of a data set."""

    def batch(self, indices: Tensor, uniforms: Tensor) -> Tensor:
        """Augmented training inputs of `indices` [B]; `uniforms` [B, 3] decide row, column and flip."""
        ...

    def plain(self, indices: Tensor) -> Tensor:
        """Inputs of `indices` [B] without augmentation."""
        ...


class ImageBatches:
    """uint8 images [N, H, W, channels], resident on a device.

    Differs: the padding is black pixels before normalisation, as torchvision's RandomCrop pads, not zeros after it.
    """

    def __init__(self, images: Tensor, recipe: Data, mean: Sequence[float], std: Sequence[float]) -> None:
        self._height, self._width, self._channels = images.shape[1:]
        self._padding = recipe.padding if recipe.augment != "none" else 0
        self._flip = recipe.augment == "crop-flip"
        if recipe.normalisation != "dataset":
            neither = (0.0,) * self._channels, (1.0,) * self._channels
            mean, std = PUBLISHED.get(recipe.normalisation, neither)
        device = images.device
        # For a whole row of pixels, so that arithmetic runs over long stretches of memory and not over three channels.
        self._offset = torch.tensor(mean, dtype=torch.float32, device=device).repeat(self._width) * 255
        self._scale = 1 / (torch.tensor(std, dtype=torch.float32, device=device).repeat(self._width) * 255)
        p = self._padding
        padded = F.pad(images, (0, 0, p, p, p, p))
        self._padded_height, self._padded_width = padded.shape[1:3]
        self._pixels = padded.view(-1, self._channels)

    def batch(self, indices: Tensor, uniforms: Tensor) -> Tensor:
        """Random crops, flipped with probability 1/2: [B, channels, H, W] float32, channels last in memory."""
        choices = 2 * self._padding + 1
        top = (uniforms[:, 0] * choices).long()
        left = (uniforms[:, 1] * choices).long()
        flip = (uniforms[:, 2] < 0.5) & self._flip
        return self._crop(indices, top, left, flip)

    def plain(self, indices: Tensor) -> Tensor:
        """The images as they are: [B, channels, H, W] float32, channels last in memory."""
        middle = torch.full_like(indices, self._padding)
        return self._crop(indices, middle, middle, torch.zeros_like(indices, dtype=torch.bool))

    def _crop(self, indices: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
        device = indices.device
        rows = top[:, None] + torch.arange(self._height, device=device)  # [B, H]
        columns = torch.arange(self._width, device=device).expand(len(indices), -1)
        columns = torch.where(flip[:, None], self._width - 1 - columns, columns) + left[:, None]  # [B, W]
        first = (indices[:, None] * self._padded_height + rows) * self._padded_width  # of each row, among all pixels
        chosen = self._pixels.index_select(0, (first[:, :, None] + columns[:, None, :]).view(-1))
        x = chosen.view(-1, self._width * self._channels).float().sub_(self._offset).mul_(self._scale)
        return x.view(-1, self._height, self._width, self._channels).permute(0, 3, 1, 2)


class PointBatches:
    """float32 points [N, D], given as they are."""

    def __init__(self, points: Tensor) -> None:
        self._points = points

    def batch(self, indices: Tensor, uniforms: Tensor) -> Tensor:
        """[B, D] float32."""
        return self._points[indices]

    def plain(self, indices: Tensor) -> Tensor:
        """[B, D] float32."""
        return self._points[indices]


def make_batches(inputs: Tensor, recipe: Data, mean: Sequence[float], std: Sequence[float]) -> Batches:
    """Batches of resident inputs: images (uint8) or points (float32)."""
    return ImageBatches(inputs, recipe, mean, std) if inputs.dtype == torch.uint8 else PointBatches(inputs)


class ClassPool:
    """Images by class, for uniform draws within classes.

    Args:
        labels: class of each image [N] int64.
        num_classes: C; every class must have an image.
    """

    def __init__(self, labels: Tensor, num_classes: int) -> None:
        self._order = labels.argsort(stable=True)
        self._counts = torch.bincount(labels, minlength=num_classes)
        self._starts = self._counts.cumsum(0) - self._counts

    def draw(self, classes: Tensor, uniforms: Tensor) -> Tensor:
        """One image index for each class [B], uniform within the class, from uniforms [B] float64."""
        counts = self._counts[classes]
        rank = (uniforms * counts).long().minimum(counts - 1)
        return self._order[self._starts[classes] + rank]
