"""Resized crops, flips, colour jitter and Cutout of whole batches, computed from uniform random numbers on the device.

Shapes: B images, channels 3 or 1, pixels 0..255. Results agree with torchvision.transforms.v2 on float images.
torchvision draws from one global generator. Here each image has its own uniforms, and only these decide how it is
augmented. No shape depends on the values and the host does no work, so a CUDA graph can record these functions.
"""

import math
from itertools import permutations

import torch
from torch import Tensor

_TRIES = 10
# Columns of the uniforms [B, U]. Before _POSITION: _TRIES pairs of an area and an aspect ratio.
_POSITION = 2 * _TRIES  # row and column of the crop
FLIP = _POSITION + 2
FACTORS = FLIP + 1  # brightness, contrast and saturation
ORDER = FACTORS + 3
NUM_CROP, NUM_JITTER = FLIP + 1, ORDER + 1
"""Uniforms per image without and with colour jitter."""
_AREA = (0.08, 1.0)  # share of the image
_SHAPE = (3 / 4, 4 / 3)  # width / height
JITTER = 0.4
ORDERS = list(permutations(range(3)))
_GREY = (0.2989, 0.587, 0.114)  # weights of red, green and blue in torchvision's rgb_to_grayscale


def crop_boxes(uniforms: Tensor, height: int, width: int) -> Tensor:
    """Draw one crop box of random area and aspect ratio per image: [B, U] -> [B, 4].

    Source: torchvision's RandomResizedCrop.get_params(scale=_AREA, ratio=_SHAPE). The first of _TRIES boxes that fits
    is taken. If none fits, the largest centred box with an allowed aspect ratio is taken.

    Args:
        uniforms: [B, U] float64 in [0, 1), U >= NUM_CROP.
        height: height of the images, in pixels.
        width: width of the images, in pixels.

    Returns:
        [B, 4] int64: top, left, height and width of each box, in pixels.
    """
    tried = uniforms[:, :_POSITION].view(-1, _TRIES, 2)
    area = height * width * (_AREA[0] + tried[..., 0] * (_AREA[1] - _AREA[0]))
    low, high = math.log(_SHAPE[0]), math.log(_SHAPE[1])
    shape = torch.exp(low + tried[..., 1] * (high - low))
    widths, heights = torch.sqrt(area * shape).round(), torch.sqrt(area / shape).round()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = (~fits).long().cumprod(1).sum(1)  # _TRIES if none fits
    w, h = width, height
    if width / height < _SHAPE[0]:
        h = round(width / _SHAPE[0])
    elif width / height > _SHAPE[1]:
        w = round(height * _SHAPE[1])
    found_w = torch.cat([widths, torch.full_like(widths[:, :1], w)], 1).gather(1, first[:, None])[:, 0]
    found_h = torch.cat([heights, torch.full_like(heights[:, :1], h)], 1).gather(1, first[:, None])[:, 0]
    room = torch.stack([height - found_h, width - found_w], 1)
    drawn = (uniforms[:, _POSITION:FLIP] * (room + 1)).floor()
    position = torch.where((first < _TRIES)[:, None], drawn, (room / 2).floor())
    return torch.cat([position, found_h[:, None], found_w[:, None]], 1).long()


def flips(uniforms: Tensor) -> Tensor:
    """Return which images are mirrored, each with probability 1/2: uniforms [B, U] -> [B] bool, U >= NUM_CROP."""
    return uniforms[:, FLIP] < 0.5


def resized_crop(images: Tensor, boxes: Tensor, size: int, flip: Tensor) -> Tensor:
    """Crop images to their boxes, resize the crops and mirror some: [B, H, W, channels] -> [B, channels, size, size].

    Source: torchvision's resized_crop(antialias=True) with bilinear interpolation, written as two products with
    matrices of weights. The second matrix also mirrors.

    Args:
        images: uint8 [B, H, W, channels].
        boxes: [B, 4] int64 from crop_boxes().
        size: side of the output squares, in pixels.
        flip: [B] bool, True for images to mirror.

    Returns:
        float32 [B, channels, size, size], values 0..255.
    """
    count, height, width, channels = images.shape
    straight = torch.zeros_like(flip)
    down = _weights(boxes[:, 0], boxes[:, 2], straight, height, size)
    across = _weights(boxes[:, 1], boxes[:, 3], flip, width, size)
    rows = torch.bmm(down, images.view(count, height, width * channels).float())
    planes = rows.view(count, size, width, channels).permute(0, 3, 1, 2).reshape(count, channels * size, width)
    return torch.bmm(planes, across.transpose(1, 2)).view(count, channels, size, size)


def _weights(start: Tensor, length: Tensor, flip: Tensor, num_in: int, num_out: int) -> Tensor:
    """Return the weight of each input pixel in each output pixel along one axis: [B, num_out, num_in], rows sum to 1.

    The crop has `length` [B] pixels from `start` [B]. Output pixels are in reverse order where `flip` [B] is True.
    """
    scale = (length.float() / num_out)[:, None]
    reach = scale.clamp(min=1)
    place = torch.arange(num_out, device=start.device)
    place = torch.where(flip[:, None], num_out - 1 - place, place)
    pixel = torch.arange(num_in, device=start.device) - start[:, None]
    inside = (pixel >= 0) & (pixel < length[:, None])
    # A pixel outside the box gets a position far away, so its weight is 0.
    pixel = torch.where(inside, (pixel + 0.5) / reach, -1e9)
    weights = pixel[:, None, :] - ((place + 0.5) * scale / reach)[:, :, None]
    weights = weights.abs_().neg_().add_(1).clamp_(min=0)
    return weights.div_(weights.sum(2, keepdim=True))


def middle(images: Tensor, size: int) -> Tensor:
    """Crop images at the centre: [B, H, W, channels] -> [B, size, size, channels]. Source: torchvision's CenterCrop."""
    top, left = (round((length - size) / 2) for length in images.shape[1:3])
    return images[:, top : top + size, left : left + size]


def planes(images: Tensor) -> Tensor:
    """Convert images to channels first: uint8 [B, H, W, channels] -> float32 [B, channels, H, W], values 0..255."""
    return images.float().permute(0, 3, 1, 2).contiguous()


def jittered(x: Tensor, uniforms: Tensor, orders: Tensor) -> Tensor:
    """Scale brightness, contrast and saturation by factors from 1 - JITTER to 1 + JITTER, in a random order per image.

    Source: torchvision's ColorJitter(0.4, 0.4, 0.4): clamp(y + f (x - y)). y is black for brightness, the mean grey
    for contrast and the grey image for saturation.

    Args:
        x: float32 [B, channels, H, W], values 0..255.
        uniforms: [B, NUM_JITTER] float64 in [0, 1).
        orders: ORDERS as a tensor [6, 3] on the device of x.

    Returns:
        Images of the shape and range of x.
    """
    factors = (1 - JITTER + 2 * JITTER * uniforms[:, FACTORS:ORDER]).to(x.dtype)
    chosen = orders[(uniforms[:, ORDER] * len(ORDERS)).long()]
    shares = _GREY if x.shape[1] == 3 else (1.0,)
    for step in range(3):
        what = chosen[:, step]
        factor = factors.gather(1, what[:, None])[:, 0].view(-1, 1, 1, 1)
        grey = x[:, :1] * shares[0]
        for channel in range(1, len(shares)):
            grey.add_(x[:, channel : channel + 1], alpha=shares[channel])
        mean = grey.mean((2, 3), keepdim=True)
        what = what.view(-1, 1, 1, 1)
        other = torch.where(what == 2, grey, torch.where(what == 1, mean, 0.0))
        x = torch.lerp(other, x, factor).clamp_(0, 255)
    return x


def cutout(uniforms: Tensor, side: int, height: int, width: int) -> Tensor:
    """Return the pixels of one square per image: uniforms [B, 2] -> [B, height, width] bool.

    Source: DeVries and Taylor, arXiv 1708.04552, and their code. The centre is uniform on all pixels, so the square may
    reach beyond the image. An even side has one pixel more before the centre than after it.

    Args:
        uniforms: [B, 2] float64 in [0, 1): row and column of the centre.
        side: side of the square, in pixels.
        height: height of the images, in pixels.
        width: width of the images, in pixels.
    """

    def near(uniform: Tensor, length: int) -> Tensor:
        place = torch.arange(length, device=uniforms.device) - (uniform * length).long()[:, None] + side // 2
        return (place >= 0) & (place < side)

    return near(uniforms[:, 0], height)[:, :, None] & near(uniforms[:, 1], width)[:, None, :]
