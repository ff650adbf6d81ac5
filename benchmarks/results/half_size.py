"""python -m benchmarks.results.half_size FOLDER DEST

Every image of an image folder at half its width and height, each pixel the mean of four, as PNG.
Networks take a quarter of the time for them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

_ENDINGS = (".jpg", ".jpeg", ".png")


def halve(folder: Path, dest: Path) -> int:
    """Returns how many there are; those of DEST that exist are kept."""
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _ENDINGS)
    for path in images:
        half = (dest / path.relative_to(folder)).with_suffix(".png")
        if not half.exists():
            half.parent.mkdir(parents=True, exist_ok=True)
            aside = half.with_suffix(".tmp")
            with Image.open(path) as image:
                image.convert("RGB").reduce(2).save(aside, format="PNG")
            aside.rename(half)
    return len(images)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("dest", type=Path)
    options = parser.parse_args(arguments)
    number = halve(options.folder, options.dest)
    if not number:
        print(f"error: {options.folder} holds no images", file=sys.stderr)
        return 2
    print(f"{options.dest}: {number:,} images")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
