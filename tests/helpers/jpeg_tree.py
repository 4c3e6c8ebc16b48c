"""A tree of small JPEG files that lists of images ask for; a class has a colour and a direction of its stripes."""

import colorsys
import math
from pathlib import Path

import numpy as np
from PIL import Image

GOLDEN = (math.sqrt(5) - 1) / 2


def picture(label: int, generator: np.random.Generator, size: int) -> Image.Image:
    """Noisy stripes; sides from `size` to 1.5 `size`."""
    height, width = (int(size * generator.uniform(1, 1.5)) for _ in range(2))
    colour = np.array(colorsys.hsv_to_rgb(label * GOLDEN % 1, 0.4 + 0.6 * (label * 7 % 10) / 10, 0.9))
    angle = math.pi * (label * 13 % 17) / 17
    y, x = np.mgrid[:height, :width] / size
    wave = np.sin(2 * math.pi * (4 + label % 5) * (x * math.cos(angle) + y * math.sin(angle)) + generator.uniform(0, 6))
    pixels = 255 * colour * (0.7 + 0.3 * wave[..., None]) + generator.normal(0, 20, (height, width, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def make(list_dir: Path, out: Path, size: int, distinct: int) -> None:
    """Write OUT/lists and OUT/images; of a class and split, at most `distinct` are no hard links to others."""
    (out / "lists").mkdir(parents=True)
    for number, source in enumerate(sorted(list_dir.glob("*.txt"))):
        (out / "lists" / source.name).write_text(source.read_text())
        made: dict[int, list[Path]] = {}
        for place, line in enumerate(source.read_text().splitlines()):
            path, _, label = line.rpartition(" ")
            file = out / "images" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            own = made.setdefault(int(label), [])
            if len(own) < distinct:
                generator = np.random.default_rng([number, int(label), len(own)])
                picture(int(label), generator, size).save(file, quality=85)
                own.append(file)
            else:
                file.hardlink_to(own[place % distinct])
