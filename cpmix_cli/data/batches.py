"""Batches from a resident data set: gather, augment and normalise as batched tensor code on the device.

One interface for all data: batch(indices [B], uniforms [B, U]) -> inputs. Images stay uint8 until a batch is made.
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
    "inaturalist": ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192)),
}
MAX_ROTATION = 15.0  # degrees


class Batches(Protocol):
    """What the engine asks of a data set."""

    num_uniforms: int
    """Numbers of [0, 1) that decide how an image is augmented."""
    device: torch.device
    """Where indices and uniforms are wanted: where resident images are, the CPU for those read from disk. Inputs come
    out on the device of the network."""
    resident: bool
    """All images are there: nothing is to be announced, and a CUDA graph can hold a batch."""

    def batch(self, indices: Tensor, uniforms: Tensor) -> Tensor:
        """Augmented training inputs of `indices` [B], as `uniforms` [B, num_uniforms] float64 say."""
        ...

    def plain(self, indices: Tensor) -> Tensor:
        """Inputs of `indices` [B] without augmentation."""
        ...

    def announce(self, indices: Tensor, uniforms: Tensor | None) -> None:
        """batch() of just these tensors' values (plain(), without uniforms) will be asked for: what is read from disk
        begins to be read. Resident images have nothing to do.
        """
        ...


class ImageBatches:
    """uint8 images [N, H, W, channels], resident on a device.

    Differs: the padding is black pixels before normalisation, as torchvision's RandomCrop pads, not zeros after it.
    """

    def __init__(self, images: Tensor, recipe: Data, mean: Sequence[float], std: Sequence[float]) -> None:
        self.num_uniforms = 3  # a row, a column and a flip; what the flip leaves of its number is an angle
        self.device = images.device
        self.resident = True
        self._height, self._width, self._channels = images.shape[1:]
        self._padding = recipe.padding if recipe.augment != "none" else 0
        self._flip = recipe.augment in ("crop-flip", "crop-flip-rotate")
        self._rotate = recipe.augment == "crop-flip-rotate"
        if recipe.normalisation != "dataset":
            neither = (0.0,) * self._channels, (1.0,) * self._channels
            mean, std = PUBLISHED.get(recipe.normalisation, neither)
        std = [s or 1.0 for s in std]  # a channel that is the same everywhere: there is nothing to divide
        device = images.device
        # For a whole row of pixels, so that arithmetic runs over long stretches of memory and not over three channels.
        self._offset = torch.tensor(mean, dtype=torch.float32, device=device).repeat(self._width) * 255
        self._scale = 1 / (torch.tensor(std, dtype=torch.float32, device=device).repeat(self._width) * 255)
        p = self._padding
        padded = F.pad(images, (0, 0, p, p, p, p))
        self._padded_height, self._padded_width = padded.shape[1:3]
        self._pixels = padded.view(-1, self._channels)

    def batch(self, indices: Tensor, uniforms: Tensor) -> Tensor:
        """Random crops, flipped with probability 1/2, turned by up to MAX_ROTATION either way about the middle of the
        crop: [B, channels, H, W] float32, channels last in memory.

        Source of the turn: torchvision's RandomRotation(15), the nearest pixel, corners black.
        """
        choices = 2 * self._padding + 1
        top = (uniforms[:, 0] * choices).long()
        left = (uniforms[:, 1] * choices).long()
        flip = (uniforms[:, 2] < 0.5) & self._flip
        angle = (4 * (uniforms[:, 2] % 0.5) - 1) * MAX_ROTATION if self._rotate else None
        return self._crop(indices, top, left, flip, angle)

    def plain(self, indices: Tensor) -> Tensor:
        """The images as they are: [B, channels, H, W] float32, channels last in memory."""
        middle = torch.full_like(indices, self._padding)
        return self._crop(indices, middle, middle, torch.zeros_like(indices, dtype=torch.bool))

    def announce(self, indices: Tensor, uniforms: Tensor | None) -> None:
        """They are there."""

    def _crop(self, indices: Tensor, top: Tensor, left: Tensor, flip: Tensor, angle: Tensor | None = None) -> Tensor:
        """[B] each; angles in degrees, against the clock."""
        device = indices.device
        rows = torch.arange(self._height, device=device).view(1, -1, 1)
        columns = torch.arange(self._width, device=device).view(1, 1, -1)
        inside = None
        if angle is not None:
            rows, columns, inside = self._turned(rows, columns, angle)
        columns = torch.where(flip[:, None, None], self._width - 1 - columns, columns) + left[:, None, None]
        first = (indices[:, None, None] * self._padded_height + rows + top[:, None, None]) * self._padded_width
        chosen = self._pixels.index_select(0, (first + columns).view(-1))
        if inside is not None:
            chosen = chosen * inside.view(-1, 1)
        x = chosen.view(-1, self._width * self._channels).float().sub_(self._offset).mul_(self._scale)
        return x.view(-1, self._height, self._width, self._channels).permute(0, 3, 1, 2)

    def _turned(self, rows: Tensor, columns: Tensor, angle: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where each pixel of a turned image comes from: row, column (0 outside) and whether inside, [B, H, W]."""
        radians = torch.deg2rad(angle)[:, None, None]
        sine, cosine = radians.sin(), radians.cos()
        middle_y, middle_x = (self._height - 1) / 2, (self._width - 1) / 2
        y, x = rows - middle_y, columns - middle_x
        from_y = (cosine * y + sine * x + middle_y).round().long()
        from_x = (cosine * x - sine * y + middle_x).round().long()
        inside = (from_y >= 0) & (from_y < self._height) & (from_x >= 0) & (from_x < self._width)
        return torch.where(inside, from_y, 0), torch.where(inside, from_x, 0), inside


class PointBatches:
    """float32 points [N, D], given as they are."""

    def __init__(self, points: Tensor) -> None:
        self.num_uniforms = 0
        self.device = points.device
        self.resident = True
        self._points = points

    def batch(self, indices: Tensor, uniforms: Tensor) -> Tensor:
        """[B, D] float32."""
        return self._points[indices]

    def plain(self, indices: Tensor) -> Tensor:
        """[B, D] float32."""
        return self._points[indices]

    def announce(self, indices: Tensor, uniforms: Tensor | None) -> None:
        """They are there."""


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
        self.num_classes = num_classes
        self._order = labels.argsort(stable=True)
        self._counts = torch.bincount(labels, minlength=num_classes)
        self._starts = self._counts.cumsum(0) - self._counts

    def draw(self, classes: Tensor, uniforms: Tensor) -> Tensor:
        """One image index for each class [...], uniform within the class, from uniforms [...] float64."""
        counts = self._counts[classes]
        rank = (uniforms * counts).long().minimum(counts - 1)
        return self._order[self._starts[classes] + rank]
