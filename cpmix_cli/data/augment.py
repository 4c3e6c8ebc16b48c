"""Resized crops, flips and colour jitter of whole batches, from uniforms: no work for the host, no shape that the data
decide, so a CUDA graph can hold it.

Shapes: B images, channels 3 or 1, pixels 0..255. Agrees with torchvision.transforms.v2 on float images. torchvision
draws from one global generator; here the uniforms of an image alone decide how it is augmented.
"""

import math
from itertools import permutations

import torch
from torch import Tensor

_TRIES = 10
_POSITION = 2 * _TRIES  # of the crop: a row and a column
_FLIP = _POSITION + 2
FACTORS = _FLIP + 1  # of brightness, contrast and saturation
ORDER = FACTORS + 3
NUM_CROP, NUM_JITTER = _FLIP + 1, ORDER + 1
"""Uniforms per image without jitter and with it: _TRIES pairs of area and shape, then those at the indices above."""
_AREA = (0.08, 1.0)  # of the image
_SHAPE = (3 / 4, 4 / 3)  # width over height
JITTER = 0.4
ORDERS = list(permutations(range(3)))
_GREY = (0.2989, 0.587, 0.114)  # of red, green and blue, as torchvision's rgb_to_grayscale has it


def crop_boxes(uniforms: Tensor, height: int, width: int) -> Tensor:
    """Boxes of random area and shape in images of `height` x `width`, from uniforms [B, NUM_CROP or more] float64:
    [B, 4] int64 with top, left, height, width.

    Source: torchvision's RandomResizedCrop.get_params(scale=_AREA, ratio=_SHAPE): the first of _TRIES that fits, else
    the middle, cut to the nearest shape that is allowed.
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
    drawn = (uniforms[:, _POSITION:_FLIP] * (room + 1)).floor()
    position = torch.where((first < _TRIES)[:, None], drawn, (room / 2).floor())
    return torch.cat([position, found_h[:, None], found_w[:, None]], 1).long()


def flips(uniforms: Tensor) -> Tensor:
    """Which images are mirrored [B] bool, from uniforms [B, NUM_CROP or more]."""
    return uniforms[:, _FLIP] < 0.5


def resized_crop(images: Tensor, boxes: Tensor, size: int, flip: Tensor) -> Tensor:
    """Crop images uint8 [B, H, W, channels] to their boxes [B, 4], scale these to `size` x `size`, and mirror those of
    `flip` [B]: float32 [B, channels, size, size].

    Source: torchvision's resized_crop(antialias=True) with bilinear interpolation, as two products with matrices of
    weights; the second also mirrors.
    """
    count, height, width, channels = images.shape
    straight = torch.zeros_like(flip)
    down = _weights(boxes[:, 0], boxes[:, 2], straight, height, size)
    across = _weights(boxes[:, 1], boxes[:, 3], flip, width, size)
    rows = torch.bmm(down, images.view(count, height, width * channels).float())
    planes = rows.view(count, size, width, channels).permute(0, 3, 1, 2).reshape(count, channels * size, width)
    return torch.bmm(planes, across.transpose(1, 2)).view(count, channels, size, size)


def _weights(start: Tensor, length: Tensor, flip: Tensor, num_in: int, num_out: int) -> Tensor:
    """Share of each of `num_in` pixels in each of `num_out`: [B, num_out, num_in] float32, rows of sum 1.

    The box has `length` [B] pixels from `start` [B]; output pixels of `flip` [B] run backwards.
    """
    scale = (length.float() / num_out)[:, None]
    reach = scale.clamp(min=1)
    place = torch.arange(num_out, device=start.device)
    place = torch.where(flip[:, None], num_out - 1 - place, place)
    pixel = torch.arange(num_in, device=start.device) - start[:, None]
    inside = (pixel >= 0) & (pixel < length[:, None])
    # Pixels outside the box are moved far away, where their weight is 0.
    pixel = torch.where(inside, (pixel + 0.5) / reach, -1e9)
    weights = pixel[:, None, :] - ((place + 0.5) * scale / reach)[:, :, None]
    weights = weights.abs_().neg_().add_(1).clamp_(min=0)
    return weights.div_(weights.sum(2, keepdim=True))


def middle(images: Tensor, size: int) -> Tensor:
    """The middle `size` x `size` of images [B, H, W, channels]. Source: torchvision's CenterCrop."""
    top, left = (round((length - size) / 2) for length in images.shape[1:3])
    return images[:, top : top + size, left : left + size]


def planes(images: Tensor) -> Tensor:
    """uint8 [B, H, W, channels] -> float32 [B, channels, H, W]."""
    return images.float().permute(0, 3, 1, 2).contiguous()


def jittered(x: Tensor, uniforms: Tensor, orders: Tensor) -> Tensor:
    """Scale brightness, contrast and saturation of x [B, channels, H, W] by 1 - JITTER to 1 + JITTER, in a random order
    per image, from uniforms [B, NUM_JITTER]; `orders` is ORDERS on the device [6, 3].

    Source: torchvision's ColorJitter(0.4, 0.4, 0.4): clamp(y + f (x - y)), where y is black, the mean grey or grey.
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
