"""Batches from a data set: gather, augment and normalise as batched tensor code on the device.

All data have one interface: batch(indices [B], uniforms [B, U]) -> inputs. Images stay uint8 until a batch is made.
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
from cpmix_cli.data.autoaugment import NUM_UNIFORMS, AutoAugment
from cpmix_cli.data.dataset import Dataset, Shaped
from cpmix_cli.data.equal_images import warn_of_changed
from cpmix_cli.data.shards import Shards
from cpmix_cli.data.stream import FileReader, ImageReader, StreamedBatches, read_in_order
from cpmix_cli.recipe.libraries import is_library_name, published
from cpmix_cli.recipe.schema import Data
from cpmix_cli.runtime import hardware, ranks
from cpmix_cli.runtime.errors import InputError

NORMALISATIONS = {  # mean and standard deviation of red, green, blue on the scale 0..1
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inaturalist": ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192)),
}
_PIECE = 8
"""Images that a CPU augments together: more do not fit in its caches."""
_MAX_ROTATION = 15.0  # degrees
_FIRST = 3
"""Uniforms of crop, flip and rotation of whole images. Those of AutoAugment and of Cutout follow."""


class Batches(Protocol):
    """Training and test inputs by index."""

    num_uniforms: int
    """U, random numbers in [0, 1) per image. Only these decide how the image is augmented."""
    alternating: int | None
    """Column of the uniforms that mirrors an image if it is below 1/2, if flips alternate; None if they are random."""
    device: torch.device
    """Device of indices and uniforms: the network's if images are resident, else the CPU."""
    resident: bool
    """True if all images are in the device's memory: prefetch() does nothing, and a CUDA graph can record batch()."""

    def batch(self, indices: Tensor, uniforms: Tensor) -> Tensor:
        """Return augmented training inputs: indices [B], uniforms [B, num_uniforms] float64 -> float32 [B, ...].

        Inputs are on the network's device.
        """
        ...

    def plain(self, indices: Tensor) -> Tensor:
        """Return inputs without augmentation: indices [B] -> float32 [B, ...]."""
        ...

    def prefetch(self, indices: Tensor, uniforms: Tensor | None) -> None:
        """Start to read the images of a later batch(indices, uniforms), or of plain(indices) if `uniforms` is None."""
        return


class Resident(Batches, Protocol):
    """Batches of inputs that are in the device's memory. StreamedBatches uses them for its arithmetic, through on()."""

    resident: bool = True

    def on(self, images: Tensor) -> Self:
        """Return a copy for other images uint8 [n, H, W, channels]. It shares the constants on the device."""
        other = copy(self)
        other._keep(images)
        return other

    def _keep(self, images: Tensor) -> None: ...


class ImageBatches(Resident):
    """Batches of whole images, uint8 [N, H, W, channels] on a device: padded crops, flips, rotation or AutoAugment.

    Differs: the padding is black pixels before normalisation, as torchvision's RandomCrop pads, not zeros after it.

    Args:
        images: uint8 [N, H, W, channels].
        recipe: table [data]: padding, augmentation and normalisation.
        mean: mean per channel on the scale 0..1, for normalisation "dataset".
        std: standard deviation per channel on the same scale.
    """

    def __init__(self, images: Tensor, recipe: Data, mean: Sequence[float], std: Sequence[float]) -> None:
        self.num_uniforms = _FIRST  # row, column, and one for both flip (u < 1/2) and angle (u mod 1/2)
        self.alternating = _FIRST - 1 if recipe.flip == "alternating" else None
        self.device = images.device
        self._height, self._width, self._channels = images.shape[1:]
        self._padding = recipe.padding if recipe.augment != "none" else 0
        self._flip = recipe.augment.startswith("crop-flip")
        self._rotate = recipe.augment == "crop-flip-rotate"
        self._policy: AutoAugment | None = None
        if recipe.augment == "crop-flip-autoaugment":
            self._policy = AutoAugment(self._height, self._width, self._channels, recipe.fill, images.device)
            self.num_uniforms += NUM_UNIFORMS
        self._cutout = recipe.cutout
        self.num_uniforms += 2 if recipe.cutout else 0
        offset, scale = normalisation(recipe, self._channels, mean, std, images.device)
        # Repeated for a row of pixels: arithmetic over a whole row is faster than over three channels.
        self._offset, self._scale = offset.repeat(self._width), scale.repeat(self._width)
        self._padded_height, self._padded_width = self._height + 2 * self._padding, self._width + 2 * self._padding
        self._keep(images)

    def _keep(self, images: Tensor) -> None:
        p = self._padding
        self._pixels = F.pad(images, (0, 0, p, p, p, p)).view(-1, self._channels)

    def batch(self, indices: Tensor, uniforms: Tensor) -> Tensor:
        """Return random crops, flipped and augmented as the recipe states: float32 [B, channels, H, W].

        The memory format is channels_last. A flip has probability 1/2. A rotation is about the centre, by up to
        _MAX_ROTATION degrees in either direction. AutoAugment comes after crop and flip, Cutout after all.

        Source of the rotation: torchvision's RandomRotation(15), nearest pixel, black corners.
        """
        choices = 2 * self._padding + 1
        top = (uniforms[:, 0] * choices).long()
        left = (uniforms[:, 1] * choices).long()
        flip = (uniforms[:, 2] < 0.5) & self._flip
        angle = (4 * (uniforms[:, 2] % 0.5) - 1) * _MAX_ROTATION if self._rotate else None
        x = self._cropped(indices, top, left, flip, angle)
        if self._policy is not None:
            x = self._policy(x, uniforms[:, _FIRST : _FIRST + NUM_UNIFORMS])
        if self._cutout:
            x = x * ~augment.cutout(uniforms[:, -2:], self._cutout, self._height, self._width)[..., None]
        return self._normalised(x)

    def plain(self, indices: Tensor) -> Tensor:
        """Return normalised images without augmentation: float32 [B, channels, H, W], memory format channels_last."""
        middle = torch.full_like(indices, self._padding)
        straight = torch.zeros_like(indices, dtype=torch.bool)
        return self._normalised(self._cropped(indices, middle, middle, straight, None))

    def _cropped(self, indices: Tensor, top: Tensor, left: Tensor, flip: Tensor, angle: Tensor | None) -> Tensor:
        """Gather one crop per image: uint8 [B, H, W, channels].

        Arguments are [B]; angles are degrees, counter-clockwise.
        """
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
        return chosen.view(-1, self._height, self._width, self._channels)

    def _normalised(self, x: Tensor) -> Tensor:
        """Normalise images: uint8 [B, H, W, channels] -> float32 [B, channels, H, W], memory format channels_last."""
        rows = x.view(-1, self._width * self._channels).float().sub_(self._offset).mul_(self._scale)
        return rows.view(-1, self._height, self._width, self._channels).permute(0, 3, 1, 2)

    def _rotated(self, rows: Tensor, columns: Tensor, angle: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the source row and column of each rotated pixel, and whether it is in the image: [B, H, W] each."""
        radians = torch.deg2rad(angle)[:, None, None]
        sine, cosine = radians.sin(), radians.cos()
        middle_y, middle_x = (self._height - 1) / 2, (self._width - 1) / 2
        y, x = rows - middle_y, columns - middle_x
        from_y = (cosine * y + sine * x + middle_y).round().long()
        from_x = (cosine * x - sine * y + middle_x).round().long()
        inside = (from_y >= 0) & (from_y < self._height) & (from_x >= 0) & (from_x < self._width)
        return torch.where(inside, from_y, 0), torch.where(inside, from_x, 0), inside


class CropBatches(Resident):
    """Batches of squares cut from larger images, uint8 [N, H, W, channels] on a device.

    Args:
        images: uint8 [N, H, W, channels].
        recipe: table [data]: side of the square, augmentation and normalisation.
        mean: mean per channel on the scale 0..1, for normalisation "dataset".
        std: standard deviation per channel on the same scale.
        cropped: training images are already random crops [N, crop, crop, channels], not whole images.
    """

    def __init__(
        self, images: Tensor, recipe: Data, mean: Sequence[float], std: Sequence[float], *, cropped: bool = False
    ) -> None:
        self.device = images.device
        self._size = recipe.crop
        self._augments = recipe.augment != "none"
        self._jitters = recipe.augment.endswith("jitter")
        self._cropped = cropped
        self._cutout = recipe.cutout
        self.num_uniforms = 0
        if self._augments:
            self.num_uniforms = augment.NUM_JITTER if self._jitters else augment.NUM_CROP
            self.num_uniforms += 2 if recipe.cutout else 0
        self.alternating = augment.FLIP if recipe.flip == "alternating" else None
        constants = normalisation(recipe, images.shape[3], mean, std, images.device)
        self._offset, self._scale = (values.view(1, -1, 1, 1) for values in constants)
        self._orders = torch.tensor(augment.ORDERS, device=images.device)
        self._keep(images)

    def _keep(self, images: Tensor) -> None:
        self._images = images

    def batch(self, indices: Tensor, uniforms: Tensor) -> Tensor:
        """Return resized crops, flipped and colour-jittered as the recipe states: float32 [B, channels, crop, crop].

        The memory format is channels_last. augment.py computes the augmentation.
        """
        return self._seen(indices, uniforms if self._augments else None)

    def plain(self, indices: Tensor) -> Tensor:
        """Return the centre of each image: float32 [B, channels, crop, crop], memory format channels_last."""
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
        if self._jitters:
            x = augment.jittered(x, uniforms, self._orders)
        if self._cutout:
            x.masked_fill_(augment.cutout(uniforms[:, -2:], self._cutout, self._size, self._size)[:, None], 0)
        return x


def published_normalisation(name: str) -> tuple[Sequence[float], Sequence[float]] | None:
    """Return mean and deviation per channel on the scale 0..1 that a data.normalisation names; None for dataset, none.

    Raises:
        EnvironmentFault, ValueError: it names a network of a library, see libraries.published().
    """
    if is_library_name(name):
        return published(name).mean, published(name).std
    return NORMALISATIONS.get(name)


def normalisation(
    recipe: Data, num_channels: int, mean: Sequence[float], std: Sequence[float], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the offset to subtract from pixels 0..255 and the scale to multiply by: float32 [channels] each."""
    if recipe.normalisation != "dataset":
        neither = (0.0,) * num_channels, (1.0,) * num_channels
        mean, std = published_normalisation(recipe.normalisation) or neither
    std = [s or 1.0 for s in std]  # a constant channel has deviation 0
    offset = torch.tensor(mean, dtype=torch.float32, device=device) * 255
    return offset, 1 / (torch.tensor(std, dtype=torch.float32, device=device) * 255)


class PointBatches(Resident):
    """Batches of points, float32 [N, D] on a device, without augmentation: indices [B] -> [B, D]."""

    def __init__(self, points: Tensor) -> None:
        self.num_uniforms = 0
        self.alternating = None
        self.device = points.device
        self._keep(points)

    def _keep(self, images: Tensor) -> None:
        self._points = images

    def batch(self, indices: Tensor, uniforms: Tensor) -> Tensor:
        return self._points[indices]

    def plain(self, indices: Tensor) -> Tensor:
        return self._points[indices]


def make_batches(inputs: Tensor, recipe: Data, record: Shaped, *, cropped: bool = False) -> Resident:
    """Return batches of inputs that are in a device's memory.

    Args:
        inputs: images uint8 [N, H, W, channels] or points float32 [N, D], on the device.
        recipe: table [data]: crop, augmentation and normalisation.
        record: mean and deviation of the pixels, for normalisation "dataset".
        cropped: as for CropBatches.
    """
    if inputs.dtype != torch.uint8:
        return PointBatches(inputs)
    if recipe.crop:
        return CropBatches(inputs, recipe, record.mean, record.std, cropped=cropped)
    return ImageBatches(inputs, recipe, record.mean, record.std)


def stream_batches(reader: ImageReader, recipe: Data, record: Shaped, device: torch.device) -> Batches:
    """Return batches of images that are read from disk on request, or earlier by prefetch().

    Args:
        reader: reads one image by index. Images of a FileReader are already cropped.
        recipe: table [data]: crop, augmentation and normalisation.
        record: mean and deviation of the pixels, for normalisation "dataset".
        device: device on which images are augmented and normalised.
    """
    none = torch.empty(0, *reader.shape, dtype=torch.uint8, device=device)
    maths = make_batches(none, recipe, record, cropped=isinstance(reader, FileReader))
    return StreamedBatches(reader, maths, device)


def open_batches(dataset: Dataset, split: str, recipe: Data, device: torch.device) -> tuple[Batches, Tensor]:
    """Return batches of a split, and the class of each image [N] int64 on the CPU.

    Images stored as tensors are loaded into the device's memory. Shards are loaded if hardware.fits() allows it. All
    other images are read from disk, batch by batch.

    Args:
        dataset: data set folder.
        split: "train", "val" or "test".
        recipe: table [data]: crop, augmentation and normalisation.
        device: device of the inputs.

    Raises:
        InputError: the split's files are missing or damaged.
    """
    if dataset.storage == "tensors":
        inputs, labels = dataset.read(split)
    else:
        if ranks.current().first:  # it looks at every file
            warn_of_changed(dataset, split)
        reader, labels = _open_reader(dataset, split, recipe), torch.from_numpy(dataset.labels(split))
        if not (isinstance(reader, Shards) and hardware.fits(reader.num_bytes, device)):
            return stream_batches(reader, recipe, dataset.record, device), labels
        inputs = torch.from_numpy(reader.load_all())
    return make_batches(inputs.to(device), recipe, dataset.record), labels


def _open_reader(dataset: Dataset, split: str, recipe: Data) -> Shards | FileReader:
    """Return a reader of a split: its shards, or its image files with the crops of the recipe."""
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
    """Yield images of a split without augmentation or normalisation: uint8 [H, W, channels] each.

    Args:
        dataset: data set folder.
        split: "train", "val" or "test".
        indices: positions in the split [n], in the order of the result.

    Raises:
        InputError: the split's files are missing or damaged.
    """
    if dataset.storage == "tensors":
        images = dataset.read(split)[0].numpy()
        yield from (images[i] for i in indices)
    else:
        yield from read_in_order(_open_reader(dataset, split, Data(augment="none")), indices.tolist())


class ClassPool:
    """Images grouped by class, to sample uniformly within a class.

    Args:
        labels: class of each image [N] int64; every class needs at least one image.
        num_classes: C.
    """

    def __init__(self, labels: Tensor, num_classes: int) -> None:
        self.num_classes = num_classes
        self._order = labels.argsort(stable=True)
        self._counts = torch.bincount(labels, minlength=num_classes)
        self._starts = self._counts.cumsum(0) - self._counts

    def draw(self, classes: Tensor, uniforms: Tensor) -> Tensor:
        """Return one random image index per class: classes [...] int64, uniforms [...] float64 -> [...] int64."""
        counts = self._counts[classes]
        rank = (uniforms * counts).long().minimum(counts - 1)
        return self._order[self._starts[classes] + rank]
