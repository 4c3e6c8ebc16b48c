"""AutoAugment's policy for CIFAR on whole batches, computed from uniform random numbers on the device.

Source: Cubuk et al., AutoAugment, CVPR 2019. The 25 sub-policies, the operations, their ranges and their rounding are
those of torchvision.transforms.v2 (AutoAugmentPolicy.CIFAR10, nearest pixel) on uint8 images. One sub-policy is drawn
per image. Its two operations follow each other, each with its probability and, where it has one, a random sign. Grey
images are augmented as torchvision augments them: colour is the identity.

Each of the two operations is three stages: geometry, then a table of 256 values per channel, then a blend. A stage
does nothing to images that drew an operation of another stage. So no shape depends on the values and the host does no
work: a CUDA graph can record it. Everything that does not depend on the images is computed once, on the CPU.

Differs: PIL copies in the long-tail code (PaCo, ProCo, BALMS, SHIKE, BalPoE) fill with grey 128 (here `data.fill`,
torchvision's default 0), round a translation at 32 pixels to 5, 13 and 15 pixels (here 4, 12, 14), shear with bicubic
interpolation (here the nearest pixel), always rotate by +6.67 degrees (here by either sign), solarize one grey level
later, and differ by up to one grey level in contrast, autocontrast, colour and sharpness. The paper's own code fills
with the data set's mean, augments before crop and flip, and has 95 sub-policies. An operation with probability p is
done if u < p (torchvision: u <= p), so that one with probability 0 never is. The policy was searched on balanced
CIFAR-10, with labels of every class.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_UNIFORMS = 5
"""Uniforms per image: the sub-policy, whether each of the two operations is done, and their signs."""
POLICIES: tuple[tuple[tuple[str, float, int], tuple[str, float, int]], ...] = (
    (("Invert", 0.1, 0), ("Contrast", 0.2, 6)),
    (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
    (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
    (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.5, 0), ("Equalize", 0.9, 0)),
    (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
    (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
    (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
    (("Equalize", 0.6, 0), ("Equalize", 0.5, 0)),
    (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
    (("Color", 0.7, 7), ("TranslateX", 0.5, 8)),
    (("Equalize", 0.3, 0), ("AutoContrast", 0.4, 0)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)),
    (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
    (("Solarize", 0.5, 2), ("Invert", 0.0, 0)),
    (("Equalize", 0.2, 0), ("AutoContrast", 0.6, 0)),
    (("Equalize", 0.2, 0), ("Equalize", 0.6, 0)),
    (("Color", 0.9, 9), ("Equalize", 0.6, 0)),
    (("AutoContrast", 0.8, 0), ("Solarize", 0.2, 8)),
    (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
    (("Solarize", 0.4, 5), ("AutoContrast", 0.9, 0)),
    (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.9, 0), ("Solarize", 0.8, 3)),
    (("Equalize", 0.8, 0), ("Invert", 0.1, 0)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, 0)),
)
"""Two operations (name, probability, magnitude's bin from 0 to 9) per sub-policy; bin 0 where there is no magnitude."""
_BINS = 10
_COMPUTED = ("Contrast", "AutoContrast", "Equalize")
"""Operations whose table depends on the image."""


class AutoAugment:
    """Augmentation of uint8 images [B, H, W, channels] by the policy.

    Args:
        height: height of the images, in pixels.
        width: width of the images, in pixels.
        channels: 3 or 1.
        fill: value of the pixels that a translation, shear or rotation leaves open, 0..255.
        device: device of the images and uniforms.
    """

    def __init__(self, height: int, width: int, channels: int, fill: int, device: torch.device) -> None:
        self._height, self._width, self._fill = height, width, fill
        ranges = _magnitudes(height, width)
        numbers = {("Identity", 0.0): 0}  # of the distinct operations with their magnitudes
        drawn = [
            [[numbers.setdefault(a, len(numbers)) for a in _signed(name, bin_, ranges)] for name, _, bin_ in policy]
            for policy in POLICIES
        ]
        chances = [[probability for _, probability, _ in policy] for policy in POLICIES]
        self._numbers = torch.tensor(drawn, device=device)  # [25, 2, 2]: policy, first or second, sign
        self._chances = torch.tensor(chances, dtype=torch.float64, device=device)  # [25, 2]
        operations = list(numbers)
        kinds = [_COMPUTED.index(name) + 1 if name in _COMPUTED else 0 for name, _ in operations]
        self._kinds = torch.tensor(kinds, device=device)
        self._sharpens = torch.tensor([name == "Sharpness" for name, _ in operations], device=device)
        # Rows by operation, of which equal ones are kept once.
        self._source_of, self._sources = _distinct([_sources(height, width, *o) for o in operations], device)
        self._table_of, self._tables = _distinct([_table(*o) for o in operations], device)
        self._blend_of, blends = _distinct([_blend(*o, channels) for o in operations], device)
        self._blends = blends.view(-1)
        factors = [1.0 + magnitude if name == "Contrast" else 1.0 for name, magnitude in operations]
        scaled = [torch.arange(256, dtype=torch.uint8).mul(factor) for factor in factors]
        self._scaled = torch.stack(scaled).to(device)
        self._shares = torch.tensor([1.0 - factor for factor in factors], device=device)
        self._levels = torch.arange(256, device=device)

    def __call__(self, images: Tensor, uniforms: Tensor) -> Tensor:
        """Augment images: uint8 [B, H, W, channels], uniforms [B, NUM_UNIFORMS] float64 in [0, 1) -> as the images."""
        policy = (uniforms[:, 0] * len(POLICIES)).long()
        done = uniforms[:, 1:3] < self._chances[policy]
        negative = (uniforms[:, 3:5] < 0.5).long()
        numbers = self._numbers[policy].gather(2, negative[:, :, None])[:, :, 0] * done
        x = images.flatten(1, 2).transpose(1, 2).contiguous()  # [B, channels, H * W]
        for number in numbers.unbind(1):
            x = self._blended(self._recoloured(self._moved(x, number), number), number)
        return x.transpose(1, 2).contiguous().view(images.shape)

    def _moved(self, x: Tensor, number: Tensor) -> Tensor:
        """Translate, shear or rotate: each pixel is copied from its nearest source."""
        source = self._sources.index_select(0, self._source_of[number])[:, None]
        return F.pad(x, (0, 1), value=self._fill).gather(2, source.expand_as(x))

    def _recoloured(self, x: Tensor, number: Tensor) -> Tensor:
        """Replace each value by that of a table: invert, solarize, posterize, brightness, contrast and histograms."""
        pixels = x.long()
        kind = self._kinds[number].view(-1, 1, 1)
        table = self._tables[self._table_of[number]][:, None]
        computed = self._contrast(x, number), self._autocontrast(x), self._equalized(pixels)
        for which, other in enumerate(computed, start=1):
            table = torch.where(kind == which, other, table)
        return table.gather(2, pixels)

    def _contrast(self, x: Tensor, number: Tensor) -> Tensor:
        """Return tables f x + (1 - f) mean grey: [B, 1, 256]. float64 has the one rounding of a fused float32 sum."""
        mean = _grey(x).sum(1, dtype=torch.float64).div(x.shape[2]).float()
        added = self._shares[number].double() * mean
        return _bytes((self._scaled[number].double() + added[:, None]).float())[:, None]

    def _autocontrast(self, x: Tensor) -> Tensor:
        """Return tables that stretch the values of each channel to 0..255: [B, channels, 256]."""
        low, high = x.amin(2, keepdim=True).float(), x.amax(2, keepdim=True).float()
        flat = low == high
        scale = torch.where(flat, 1.0, (high - low) * (1 / 255))
        return _bytes((self._levels - torch.where(flat, 0.0, low)) / scale)

    def _equalized(self, pixels: Tensor) -> Tensor:
        """Return tables that equalize the histogram of each channel, as PIL does: [B, channels, 256]."""
        counts = torch.zeros(*pixels.shape[:2], 256, dtype=torch.int32, device=pixels.device)
        counts.scatter_add_(2, pixels, torch.ones_like(pixels[:1, :1, :1], dtype=torch.int32).expand_as(pixels))
        largest = counts.gather(2, pixels.amax(2, keepdim=True))
        step = torch.div(pixels.shape[2] - largest, 255, rounding_mode="floor")
        below = counts.cumsum(2, dtype=torch.int32) - counts
        found = torch.div(below + step // 2, step.clamp(min=1), rounding_mode="floor").clamp(max=255)
        return torch.where(step > 0, found, self._levels).to(torch.uint8)

    def _blended(self, x: Tensor, number: Tensor) -> Tensor:
        """Change colour, a blend with the grey image, or sharpness, a blend with the blurred image."""
        sharpens = self._sharpens[number].view(-1, 1, 1)
        other = torch.where(sharpens, self._blurred(x), _grey(x).to(torch.int16)[:, None])
        index = (self._blend_of[number] * 256).int().view(-1, 1, 1) + other
        return self._blends.index_select(0, (index * 256 + x).view(-1)).view_as(x)

    def _blurred(self, x: Tensor) -> Tensor:
        """Return the mean over 3 x 3 pixels, the middle one 5 times: int16, as x. The border is not blurred."""
        blurred = x.to(torch.int16).view(*x.shape[:2], self._height, self._width)
        rows = blurred[:, :, :-2] + blurred[:, :, 1:-1] + blurred[:, :, 2:]
        inner = blurred[:, :, 1:-1, 1:-1]
        total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * inner
        inner.copy_((total.float() / 13).round_())  # a 13th is never half-way
        return blurred.view_as(x)


def _magnitudes(height: int, width: int) -> dict[str, Tensor]:
    """Return the magnitude of each bin [10], of the operations that have one; signed ones first."""
    return {
        "ShearY": torch.linspace(0.0, 0.3, _BINS),
        "TranslateX": torch.linspace(0.0, 150.0 / 331.0 * width, _BINS).trunc(),
        "TranslateY": torch.linspace(0.0, 150.0 / 331.0 * height, _BINS).trunc(),
        "Rotate": torch.linspace(0.0, 30.0, _BINS),
        **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), torch.linspace(0.0, 0.9, _BINS)),
        "Posterize": (8 - torch.arange(_BINS) / ((_BINS - 1) / 4)).round(),
        "Solarize": torch.linspace(1.0, 0.0, _BINS),
    }


def _signed(name: str, bin_: int, ranges: dict[str, Tensor]) -> list[tuple[str, float]]:
    """Return an operation with its magnitude as it is, and with the other sign if it has one."""
    magnitude = float(ranges[name][bin_]) if name in ranges else 0.0
    unsigned = name not in ranges or name in ("Posterize", "Solarize")
    return [(name, magnitude), (name, magnitude if unsigned else -magnitude)]


def _distinct(rows: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the number of each row [n] among the distinct ones, and these [k, ...], on the device."""
    distinct, numbers = torch.unique(torch.stack(list(rows)), dim=0, return_inverse=True)
    return numbers.to(device), distinct.to(device)


def _sources(height: int, width: int, name: str, magnitude: float) -> Tensor:
    """Return the pixel that each pixel is copied from, H * W if it is outside the image: [H * W] int64.

    In float64, so that the nearest pixel is that of exact arithmetic, unless it is half-way.
    """
    y = torch.arange(height, dtype=torch.float64)[:, None] - (height - 1) / 2
    x = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    from_y, from_x = y, x
    if name == "TranslateX":
        from_x = x - magnitude
    elif name == "TranslateY":
        from_y = y - magnitude
    elif name == "ShearY":  # about the corner
        from_y = y + magnitude * (x + width / 2)
    elif name == "Rotate":  # about the centre, counter-clockwise
        sine, cosine = math.sin(math.radians(magnitude)), math.cos(math.radians(magnitude))
        from_y, from_x = cosine * y + sine * x, cosine * x - sine * y
    row = (from_y + (height - 1) / 2).round().long().expand(height, width)
    column = (from_x + (width - 1) / 2).round().long().expand(height, width)
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return torch.where(inside, row * width + column, height * width).view(-1)


def _table(name: str, magnitude: float) -> Tensor:
    """Return the new value of each value, for operations that need nothing else: [256] uint8."""
    levels = torch.arange(256, dtype=torch.uint8)
    if name == "Invert":
        return levels.bitwise_not()
    if name == "Solarize":
        return torch.where(levels >= 255 * magnitude, levels.bitwise_not(), levels)
    if name == "Posterize":
        return levels.bitwise_and(256 - 2 ** (8 - int(magnitude)))
    return _bytes(levels.mul(1.0 + magnitude)) if name == "Brightness" else levels


def _blend(name: str, magnitude: float, channels: int) -> Tensor:
    """Return the blend of each value of an image with each value of another: [other's value, value] uint8."""
    levels, factor = torch.arange(256, dtype=torch.uint8), 1.0 + magnitude
    image, other = levels.expand(256, 256).contiguous(), levels.float()[:, None].expand(256, 256).contiguous()
    if name == "Color" and channels == 3:
        return _bytes(image.mul(factor).add_(other, alpha=1.0 - factor))
    if name == "Sharpness":
        return _bytes(image.float().add_(other.sub_(image), alpha=1.0 - factor))
    return image


def _grey(x: Tensor) -> Tensor:
    """Return the grey value of each pixel, as torchvision rounds it: uint8 [B, channels, P] -> float32 [B, P]."""
    if x.shape[1] == 1:
        return x[:, 0].float()
    return x[:, 0].mul(0.2989).add_(x[:, 1], alpha=0.587).add_(x[:, 2], alpha=0.114).floor_()


def _bytes(x: Tensor) -> Tensor:
    return x.clamp_(0, 255).to(torch.uint8)
