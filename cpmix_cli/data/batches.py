"""Batches from a data set: gather, augment and normalise as batched tensor code on the device.

One interface for all data: batch(indices [B], uniforms [B, U]) -> inputs. Images stay uint8 until a batch is made.
"""

from collections.abc import Iterator, Sequence
from copy import copy
from typing import Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cpmix_cli.data import augment
from cpmix_cli.data.dataset import Dataset, Shaped
from cpmix_cli.data.shards import Shards
from cpmix_cli.data.stream import FileReader, ImageReader, StreamedBatches, read_in_order
from cpmix_cli.recipe.schema import Data
from cpmix_cli.runtime import hardware
from cpmix_cli.runtime.errors import InputError

NORMALISATIONS = {  # mean and standard deviation of red, green, blue on the scale 0..1
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inaturalist": ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192)),
}
_PIECE = 8
"""Images that a CPU augments at a time: its caches hold so many."""
_MAX_ROTATION = 15.0  # degrees


class Batches(Protocol):
    """Training and test inputs by index."""

    num_uniforms: int
    """Random numbers in [0, 1) that decide how one image is augmented."""
    device: torch.device
    """Device of indices and uniforms: that of resident images, else the CPU. Inputs are on the network's device."""
    resident: bool
    """All images are in the device's memory: prefetch() does nothing, and a CUDA graph can hold a batch."""

    def batch(self, indices: Tensor, uniforms: Tensor) -> Tensor:
        """Return training inputs of `indices` [B], augmented by `uniforms` [B, num_uniforms] float64."""
        ...

    def plain(self, indices: Tensor) -> Tensor:
        """Return inputs of `indices` [B] without augmentation."""
        ...

    def prefetch(self, indices: Tensor, uniforms: Tensor | None) -> None:
        """Start to read what batch() of these values (without uniforms: plain()) will request."""
        return


class Resident(Batches, Protocol):
    """Batches of inputs on a device; streamed images get the same arithmetic, see on()."""

    resident: bool = True

    def on(self, images: Tensor) -> Self:
        """Return such batches of other images uint8 [n, H, W, channels]; no constant is sent to the device again."""
        other = copy(self)
        other._keep(images)
        return other

    def _keep(self, images: Tensor) -> None: ...


class ImageBatches(Resident):
    """uint8 images [N, H, W, channels], resident on a device.

    Differs: the padding is black pixels before normalisation, as torchvision's RandomCrop pads, not zeros after it.
    """

    def __init__(self, images: Tensor, recipe: Data, mean: Sequence[float], std: Sequence[float]) -> None:
        self.num_uniforms = 3  # a row, a column and a flip; what the flip leaves of its number is an angle
        self.device = images.device
        self._height, self._width, self._channels = images.shape[1:]
        self._padding = recipe.padding if recipe.augment != "none" else 0
        self._flip = recipe.augment in ("crop-flip", "crop-flip-rotate")
        self._rotate = recipe.augment == "crop-flip-rotate"
        offset, scale = _normalisation(recipe, self._channels, mean, std, images.device)
        # For a whole row of pixels, so that arithmetic runs over long stretches of memory and not over three channels.
        self._offset, self._scale = offset.repeat(self._width), scale.repeat(self._width)
        self._padded_height, self._padded_width = self._height + 2 * self._padding, self._width + 2 * self._padding
        self._keep(images)

    def _keep(self, images: Tensor) -> None:
        p = self._padding
        self._pixels = F.pad(images, (0, 0, p, p, p, p)).view(-1, self._channels)

    def batch(self, indices: Tensor, uniforms: Tensor) -> Tensor:
        """Random crops, mirrored with probability 1/2, rotated by up to _MAX_ROTATION either way about the middle:
        [B, channels, H, W] float32, channels last in memory.

        Source of the rotation: torchvision's RandomRotation(15), nearest pixel, black corners.
        """
        choices = 2 * self._padding + 1
        top = (uniforms[:, 0] * choices).long()
        left = (uniforms[:, 1] * choices).long()
        flip = (uniforms[:, 2] < 0.5) & self._flip
        angle = (4 * (uniforms[:, 2] % 0.5) - 1) * _MAX_ROTATION if self._rotate else None
        return self._crop(indices, top, left, flip, angle)

    def plain(self, indices: Tensor) -> Tensor:
        """The images as they are: [B, channels, H, W] float32, channels last in memory."""
        middle = torch.full_like(indices, self._padding)
        return self._crop(indices, middle, middle, torch.zeros_like(indices, dtype=torch.bool), None)

    def _crop(self, indices: Tensor, top: Tensor, left: Tensor, flip: Tensor, angle: Tensor | None) -> Tensor:
        """Each argument is [B]; angles in degrees, counter-clockwise."""
        device = indices.device
        rows = torch.arange(self._height, device=device).view(1, -1, 1)
        columns = torch.arange(self._width, device=device).view(1, 1, -1)
        inside = None
        if angle is not None:
            rows, columns, inside = self._rotated(rows, columns, angle)
        columns = torch.where(flip[:, None, None], self._width - 1 - columns, columns) + left[:, None, None]
        first = (indices[:, None, None] * self._padded_height + rows + top[:, None, None]) * self._padded_width
        chosen = self._pixels.index_select(0, (first + columns).view(-1))
        if inside is not None:
            chosen = chosen * inside.view(-1, 1)
        x = chosen.view(-1, self._width * self._channels).float().sub_(self._offset).mul_(self._scale)
        return x.view(-1, self._height, self._width, self._channels).permute(0, 3, 1, 2)

    def _rotated(self, rows: Tensor, columns: Tensor, angle: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Source of each pixel of a rotated image: row, column (0 outside) and whether it is inside, [B, H, W]."""
        radians = torch.deg2rad(angle)[:, None, None]
        sine, cosine = radians.sin(), radians.cos()
        middle_y, middle_x = (self._height - 1) / 2, (self._width - 1) / 2
        y, x = rows - middle_y, columns - middle_x
        from_y = (cosine * y + sine * x + middle_y).round().long()
        from_x = (cosine * x - sine * y + middle_x).round().long()
        inside = (from_y >= 0) & (from_y < self._height) & (from_x >= 0) & (from_x < self._width)
        return torch.where(inside, from_y, 0), torch.where(inside, from_x, 0), inside


class CropBatches(Resident):
    """uint8 images [N, H, W, channels], resident on a device; the network sees squares of them.

    With `cropped`, training images are random crops already: [N, crop, crop, channels].
    """

    def __init__(
        self, images: Tensor, recipe: Data, mean: Sequence[float], std: Sequence[float], *, cropped: bool = False
    ) -> None:
        self.device = images.device
        self._size = recipe.crop
        self._augments = recipe.augment != "none"
        self._jitters = recipe.augment.endswith("jitter")
        self._cropped = cropped
        self.num_uniforms = 0
        if self._augments:
            self.num_uniforms = augment.NUM_JITTER if self._jitters else augment.NUM_CROP
        constants = _normalisation(recipe, images.shape[3], mean, std, images.device)
        self._offset, self._scale = (values.view(1, -1, 1, 1) for values in constants)
        self._orders = torch.tensor(augment.ORDERS, device=images.device)
        self._keep(images)

    def _keep(self, images: Tensor) -> None:
        self._images = images

    def batch(self, indices: Tensor, uniforms: Tensor) -> Tensor:
        """Random resized crops, flipped with probability 1/2, with other colours: [B, channels, crop, crop] float32,
        channels last in memory; see augment.py.
        """
        return self._seen(indices, uniforms if self._augments else None)

    def plain(self, indices: Tensor) -> Tensor:
        """The middle of each image: [B, channels, crop, crop] float32, channels last in memory."""
        return self._seen(indices, None)

    def _seen(self, indices: Tensor, uniforms: Tensor | None) -> Tensor:
        count, channels = len(indices), self._images.shape[3]
        seen = torch.empty(
            (count, channels, self._size, self._size), device=self.device, memory_format=torch.channels_last
        )
        size = _PIECE if self.device.type == "cpu" else max(count, 1)
        for first in range(0, count, size):
            piece = slice(first, first + size)
            images = self._images[indices[piece]]
            if uniforms is not None:
                x = self._augmented(images, uniforms[piece])
            else:
                x = augment.planes(augment.middle(images, self._size))
            seen[piece] = x.sub_(self._offset).mul_(self._scale)
        return seen

    def _augmented(self, images: Tensor, uniforms: Tensor) -> Tensor:
        flip = augment.flips(uniforms)
        if self._cropped:
            x = augment.planes(images)
            x = torch.where(flip[:, None, None, None], x.flip(3), x)
        else:
            boxes = augment.crop_boxes(uniforms, images.shape[1], images.shape[2])
            x = augment.resized_crop(images, boxes, self._size, flip)
        return augment.jittered(x, uniforms, self._orders) if self._jitters else x


def _normalisation(
    recipe: Data, num_channels: int, mean: Sequence[float], std: Sequence[float], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Offset to subtract from each channel of pixels 0..255, and scale to multiply by: float32 [channels] each."""
    if recipe.normalisation != "dataset":
        neither = (0.0,) * num_channels, (1.0,) * num_channels
        mean, std = NORMALISATIONS.get(recipe.normalisation, neither)
    std = [s or 1.0 for s in std]  # a channel that is the same everywhere: there is nothing to divide
    offset = torch.tensor(mean, dtype=torch.float32, device=device) * 255
    return offset, 1 / (torch.tensor(std, dtype=torch.float32, device=device) * 255)


class PointBatches(Resident):
    """float32 points [N, D], given as they are: [B, D]."""

    def __init__(self, points: Tensor) -> None:
        self.num_uniforms = 0
        self.device = points.device
        self._keep(points)

    def _keep(self, images: Tensor) -> None:
        self._points = images

    def batch(self, indices: Tensor, uniforms: Tensor) -> Tensor:
        return self._points[indices]

    def plain(self, indices: Tensor) -> Tensor:
        return self._points[indices]


def make_batches(inputs: Tensor, recipe: Data, record: Shaped, *, cropped: bool = False) -> Resident:
    """Return batches of resident inputs: points (float32), or images (uint8) with the mean and deviation of `record`.

    See CropBatches for `cropped`.
    """
    if inputs.dtype != torch.uint8:
        return PointBatches(inputs)
    if recipe.crop:
        return CropBatches(inputs, recipe, record.mean, record.std, cropped=cropped)
    return ImageBatches(inputs, recipe, record.mean, record.std)


def stream_batches(reader: ImageReader, recipe: Data, record: Shaped, device: torch.device) -> Batches:
    """Return batches of images that are read from disk when they are needed; `record` as for make_batches()."""
    none = torch.empty(0, *reader.shape, dtype=torch.uint8, device=device)
    maths = make_batches(none, recipe, record, cropped=isinstance(reader, FileReader))
    return StreamedBatches(reader, maths, device)


def open_batches(dataset: Dataset, split: str, recipe: Data, device: torch.device) -> tuple[Batches, Tensor]:
    """Return batches of a data set's split, and the class of each image [N] int64 on the CPU.

    Images are resident if stored as tensors, or as shards that fit on the device (see hardware.fits()); else batches
    are read from disk.

    Raises:
        InputError: the split's files are missing or damaged.
    """
    if dataset.storage == "tensors":
        inputs, labels = dataset.read(split)
    else:
        reader, labels = _open_reader(dataset, split, recipe), torch.from_numpy(dataset.labels(split))
        if not (isinstance(reader, Shards) and hardware.fits(reader.num_bytes, device)):
            return stream_batches(reader, recipe, dataset.record, device), labels
        inputs = torch.from_numpy(reader.load_all())
    return make_batches(inputs.to(device), recipe, dataset.record), labels


def _open_reader(dataset: Dataset, split: str, recipe: Data) -> Shards | FileReader:
    """Open the shards of a split, or its image files as a recipe crops them."""
    if dataset.storage == "shards":
        return dataset.shards(split)
    root = dataset.data_root
    if root is None or not root.is_dir():
        raise InputError(
            f"no folder {root}, where the images of {dataset.name} are",
            fix="name the folder where they are: --data-root DIR",
        )
    fix = "restore or repair the file; if the images have moved, name their folder with --data-root"
    return FileReader(dataset.paths(split), dataset.shape, recipe, upright=dataset.upright, fix=fix)


def pictures(dataset: Dataset, split: str, indices: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
    """Yield images of a split as they are stored or tested on: uint8 [H, W, channels]; raises as open_batches()."""
    if dataset.storage == "tensors":
        images = dataset.read(split)[0].numpy()
        yield from (images[i] for i in indices)
    else:
        yield from read_in_order(_open_reader(dataset, split, Data(augment="none")), indices.tolist())


class ClassPool:
    """Images by class, for uniform draws within classes. Of the `labels` [N] int64, every class must have an image."""

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
