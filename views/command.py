"""python -m views pack NAME|PATH FILE.h5 [--encoded] [key=value ...]    images as one file
python -m views pack NAME|PATH FILE.json --short-side 256              as shards with an index
python -m views pack NAME|PATH                                         to dataset.packed
python -m views check NAME|PATH                                        decode every image

Packs all images of the dataset in a teacher's config. Keys that select some of them, such as
`max_per_class`, apply when the packed file is read. Decoded pixels, and files packed with their
original bytes, are the same dataset as the original and share its cache. Re-encoded images are a
different dataset.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from teach_once.configs.load import check_data_exists, load_teacher
from teach_once.configs.schema import HuggingFace, ImageFolder, TeacherConfig, WebDataset
from teach_once.runtime.command.frame import new_app, new_console, run_command
from teach_once.runtime.command.options import TeacherName, can_be_quiet
from teach_once.runtime.command.program import program_text
from teach_once.runtime.command.progress import Progress
from teach_once.runtime.formats import format_size
from teach_once.runtime.machine.resources import usable_cores
from teach_once.views.datasets import open_source
from teach_once.views.images.check import check_split, summarize
from teach_once.views.images.encoded import EncodedSource, encoded_folder
from teach_once.views.packed.format import SUFFIX
from teach_once.views.packed.recode import Recode
from teach_once.views.packed.write import pack_encoded, pack_pixels, pack_shards
from teach_once.views.splits import DatasetError, Selection

app = new_app("Prepare datasets.")

_ShortSide = Annotated[
    int | None,
    typer.Option(min=1, metavar="PX", help="shrink images until their short side has PX pixels"),
]
_MaxSide = Annotated[
    int | None,
    typer.Option(min=1, metavar="PX", help="shrink images until their long side has PX pixels"),
]


@app.command()
@can_be_quiet
def pack(
    name: TeacherName,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILE [KEY=VALUE]...",
            help="FILE.h5, or FILE.json with shards next to it (default: dataset.packed); then new "
            "values for keys of the config",
        ),
    ] = None,
    encoded: Annotated[
        bool, typer.Option("--encoded", help="store original bytes instead of decoded pixels")
    ] = False,
    short_side: _ShortSide = None,
    max_side: _MaxSide = None,
    quality: Annotated[
        int | None, typer.Option(min=1, max=100, help="JPEG quality of re-encoded images")
    ] = None,
    shard_mb: Annotated[int, typer.Option(min=1, help="approximate size of a shard")] = 1000,
    workers: Annotated[
        int | None, typer.Option(min=0, help="processes that shrink images; default: all cores")
    ] = None,
) -> None:
    """Pack the images of a teacher's config into one file, or into shards with an index.

    Use it with dataset: {type: packed, file: FILE, ...}.

    By default the images are stored as decoded pixels and must all have the same size. --short-side
    (such as 256, for training on crops) and --max-side (a limit on the long side, for panoramas)
    shrink larger images and store them as JPEG of --quality (90); other images keep their bytes.
    --quality alone re-encodes all images. Existing shards are not packed again.
    """
    file, overrides = _file_and_overrides(words or [])
    config = load_teacher(name, overrides)
    check_data_exists(config, packing=True)
    file = file or _default_file(config)
    console = new_console()
    recode = None
    if any(option is not None for option in (short_side, max_side, quality)):
        recode = Recode(short_side, max_side, 90 if quality is None else quality)
    num_workers = usable_cores() if workers is None else workers
    is_original = config.dataset.packed_as is not None
    if recode is None and not encoded and not is_original and file.suffix != SUFFIX:
        _pack_pixels(config, file, console)
        return
    source = _encoded_source(config)
    _print_hints(source.hints, console)
    options = {"max_pixels": _max_pixels(config), "num_workers": num_workers}
    if file.suffix == SUFFIX:
        shard_bytes = shard_mb * 1_000_000
        size = pack_shards(
            source, file, recode, shard_bytes=shard_bytes, console=console, **options
        )
    else:
        total = sum(map(len, source.splits.values()))
        with Progress(total, "images", console) as progress:
            pack_encoded(source, file, recode, advance=progress.advance, **options)
        size = file.stat().st_size
    console.print(_outcome(file, len(source.train), len(source.test), size))


@app.command()
def check(
    name: TeacherName,
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="new values for keys of the config"),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="processes that decode images; default: all cores")
    ] = None,
) -> None:
    """Decode every image of a teacher's config and list all that cannot be read.

    Tar shards and tables are checked in their original form until they are packed.
    """
    config = load_teacher(name, words or [])
    dataset, console = config.dataset, new_console()
    is_packed = dataset.packed_as is not None and os.path.lexists(dataset.packed_as)
    check_data_exists(config, packing=not is_packed)
    needs_packing = dataset.packed_as is not None and not is_packed
    source = _encoded_source(config) if needs_packing else open_source(dataset)
    _print_hints(source.hints, console)
    splits = {"training": source.train, "test": source.test}
    with Progress(sum(map(len, splits.values())), "images", console) as progress:
        reports = {
            split: check_split(
                images,
                _max_pixels(config),
                usable_cores() if workers is None else workers,
                progress.advance,
            )
            for split, images in splits.items()
        }
    console.print(summarize(reports))
    if faults := [fault for report in reports.values() for fault in report.faults]:
        for fault in faults:
            console.print(f"  {fault}", markup=False, soft_wrap=True)
        raise DatasetError(
            f"{len(faults):,} images cannot be read; they are listed above",
            fix="replace or remove them",
        )
    console.print("every image can be read")


def _pack_pixels(config: TeacherConfig, file: Path, console: Console) -> None:
    dataset = config.dataset
    source = open_source(dataset)
    _print_hints(source.hints, console)
    chosen = Selection.of_config(dataset).choose(source.train)
    pack_pixels(source, file, [ids for ids in chosen if len(ids)])
    console.print(_outcome(file, len(source.train), len(source.test), file.stat().st_size))


def _print_hints(hints: Sequence[str], console: Console) -> None:
    for hint in hints:
        console.print(hint)


def _file_and_overrides(words: list[str]) -> tuple[Path | None, list[str]]:
    """Split the arguments into the file, if the first one is not an override, and overrides."""
    if words and "=" not in words[0]:
        return Path(words[0]), words[1:]
    return None, words


def _default_file(config: TeacherConfig) -> Path:
    if config.dataset.packed_as is None:
        raise DatasetError(
            "which file to pack into?", fix=f"{program_text('views')} pack NAME|PATH FILE.h5"
        )
    return Path(config.dataset.packed_as)


def _encoded_source(config: TeacherConfig) -> EncodedSource:
    dataset = config.dataset
    if isinstance(dataset, WebDataset):
        from teach_once.views.images.webdataset import web_dataset

        return web_dataset(dataset)
    if isinstance(dataset, HuggingFace):
        from teach_once.views.images.huggingface import hugging_face

        return hugging_face(dataset)
    return encoded_folder(open_source(config.dataset))


def _max_pixels(config: TeacherConfig) -> int:
    return int(getattr(config.dataset, "max_pixels", ImageFolder.max_pixels))


def _outcome(file: Path, num_train: int, num_test: int, num_bytes: int) -> str:
    return f"{file}: {num_train:,} training and {num_test:,} test images, {format_size(num_bytes)}"


def cli(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_command(app, arguments)
