"""A tree of small JPEG files that lists of images ask for, to try large sets without having them.

    python tests/helpers/jpeg_tree.py LISTDIR OUT [--images N] [--size 64] [--distinct 8]

LISTDIR holds lists whose names end in train.txt, test.txt and perhaps val.txt. OUT/images gets the files, OUT/lists the
lists of what is there. Without --images all files of the lists are made, and build-lt takes the official lists as they
are. With it the first images of each class are, in proportion, about N for training and of the other splits as large a
share; such lists are no published ones, and go by `build-lt image-folder --list-dir OUT/lists --data-root OUT/images`.
A class has a colour and a direction of its stripes, so that a network can learn it. At most --distinct pictures of a
class and split are different; the others are hard links to these.
"""

import argparse
import colorsys
import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image

GOLDEN = (math.sqrt(5) - 1) / 2


def picture(label: int, generator: np.random.Generator, size: int) -> Image.Image:
    """Noisy stripes, their colours and direction the class's; sides from `size` to 1.5 `size`."""
    height, width = (int(size * generator.uniform(1, 1.5)) for _ in range(2))
    colour = np.array(colorsys.hsv_to_rgb(label * GOLDEN % 1, 0.4 + 0.6 * (label * 7 % 10) / 10, 0.9))
    angle = math.pi * (label * 13 % 17) / 17
    y, x = np.mgrid[:height, :width] / size
    wave = np.sin(2 * math.pi * (4 + label % 5) * (x * math.cos(angle) + y * math.sin(angle)) + generator.uniform(0, 6))
    pixels = 255 * colour * (0.7 + 0.3 * wave[..., None]) + generator.normal(0, 20, (height, width, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def shortened(lines: list[tuple[str, int]], share: float) -> list[tuple[str, int]]:
    """The first images of each class, at least one."""
    counts = np.bincount([label for _, label in lines])
    left = np.maximum(1, (counts * share).round()).astype(int)
    kept = []
    for path, label in lines:
        if left[label] > 0:
            left[label] -= 1
            kept.append((path, label))
    return kept


def make(list_dir: Path, out: Path, num_images: int | None = None, size: int = 64, distinct: int = 8) -> int:
    """Write files and lists; returns the number of files."""
    names = sorted(p.name for p in list_dir.glob("*.txt") if p.stem.endswith(("train", "val", "test")))
    lists = {}
    for name in names:
        rows = (line.rsplit(" ", 1) for line in (list_dir / name).read_text().splitlines())
        lists[name] = [(path, int(label)) for path, label in rows]
    if num_images is not None:
        total = len(next(lines for name, lines in lists.items() if name.endswith("train.txt")))
        lists = {name: shortened(lines, num_images / total) for name, lines in lists.items()}
    (out / "lists").mkdir(parents=True)
    for number, (name, lines) in enumerate(lists.items()):
        (out / "lists" / name).write_text("".join(f"{path} {label}\n" for path, label in lines))
        made: dict[int, list[Path]] = {}
        for place, (path, label) in enumerate(lines):
            file = out / "images" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            own = made.setdefault(label, [])
            if len(own) < distinct:
                picture(label, np.random.default_rng([number, label, len(own)]), size).save(file, quality=85)
                own.append(file)
            else:
                file.hardlink_to(own[place % distinct])
    return sum(map(len, lists.values()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list_dir", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--distinct", type=int, default=8)
    given = parser.parse_args()
    count = make(given.list_dir, given.out, given.images, given.size, given.distinct)
    sys.stdout.write(f"{count:,} files in {given.out / 'images'}, lists in {given.out / 'lists'}\n")
