"""python -m views pack NAME|PATH FILE.h5 [--encoded] [key=value ...]    an image folder as one file

Packs all images of the folder that a teacher's config names: `limit` and `validation_fraction`
choose among them when the file is read. The packed form serves the caches of the folder, and the
folder those of its packed form.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from configs.load import load_teacher, refuse_missing_data
from runtime.commands import new_app, new_console, run_command
from runtime.options import Overrides, TeacherName
from views.datasets import open_source
from views.pack import pack_encoded, pack_pixels
from views.splits import chosen_ids

app = new_app("Prepare datasets.")


@app.callback()
def main() -> None:
    """Makes typer expect the command's name although there is only one command."""


@app.command()
def pack(
    name: TeacherName,
    file: Annotated[Path, typer.Argument(metavar="FILE.h5", help="the file to write")],
    overrides: Overrides = None,
    encoded: Annotated[
        bool, typer.Option("--encoded", help="keep the files' own bytes, not decoded pixels")
    ] = False,
) -> None:
    """Pack the image folder of a teacher's config into one file.

    Use it with dataset: {type: packed, file: FILE.h5, ...}.

    Without --encoded the images are stored as decoded pixels and must all have one size.
    """
    config = load_teacher(name, overrides or [])
    refuse_missing_data(config)
    dataset = config.dataset
    source = open_source(dataset)
    if encoded:
        pack_encoded(source, file)
    else:
        chosen = chosen_ids(source.train.labels, dataset.limit, dataset.validation_fraction)
        pack_pixels(source, file, [ids for ids in chosen if len(ids)])
    new_console().print(
        f"{file}: {len(source.train):,} training and {len(source.test):,} test images, "
        f"{file.stat().st_size:,} bytes"
    )


def cli(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_command(app, arguments)


if __name__ == "__main__":
    sys.exit(cli())
