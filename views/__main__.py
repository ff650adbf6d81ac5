"""python -m views pack NAME|PATH FILE.h5 [--encoded] [key=value ...]

Packs the image folder that a teacher's config names into one file, all of it: `limit` and
`validation_fraction` choose from it when it is read. Then use it with
`dataset: {type: packed, file: FILE.h5, ...}`. By default as decoded uint8 pixels of one size; with
--encoded as the files' own bytes. A cache of the folder serves its packed form, and the reverse.
"""

from __future__ import annotations

import sys
from pathlib import Path

from configs.load import ConfigError, load_teacher, refuse_missing_data
from views.datasets import DatasetError, open_source
from views.packed import pack_encoded, pack_pixels
from views.splits import chosen_ids


def main(arguments: list[str]) -> int:
    encoded = "--encoded" in arguments
    match [word for word in arguments if word != "--encoded"]:
        case ["pack", name, file, *overrides] if not file.startswith("-"):
            teacher = load_teacher(name, overrides)
            refuse_missing_data(teacher)
            config = teacher.dataset
            source = open_source(config)
            chosen = [
                ids
                for ids in chosen_ids(source.train.labels, config.limit, config.validation_fraction)
                if len(ids)
            ]
            target = Path(file)
            (pack_encoded if encoded else pack_pixels)(source, target, chosen)
        case _:
            print(__doc__, file=sys.stderr)
            return 0 if arguments == ["--help"] else 2
    print(
        f"{target}: {len(source.train):,} training and {len(source.test):,} test images, "
        f"{target.stat().st_size:,} bytes"
    )
    return 0


def cli(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except (ConfigError, DatasetError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(cli(sys.argv[1:]))
