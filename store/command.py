"""python -m store list [--caches DIR]                 all caches: teacher, size, progress
python -m store info PATH [--json] [--plot FILE]     one cache: identity, taps, bytes, versions
python -m store check [PATH ...]                     read every byte; default: of all caches
python -m store export CACHE FILE.h5                 write a cache as one HDF5 file
python -m store import FILE.h5 [DIR]                 turn such a file into a cache folder
python -m store copy CACHE DEST                      to or from a folder or s3://bucket/prefix
python -m store convert CACHE DEST --logits top:32   make a cache of smaller types
python -m store trim CACHE [--views 4] [--drop-taps attention,hint]     make a cache smaller

A CACHE or PATH is a folder, a file, a URL, or the name of a teacher with one cache in `caches`.

Exit status: for check 0 valid, 1 invalid or incomplete, 2 unusable; otherwise 0, or 2 for errors.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn
from rich.progress import TransferSpeedColumn as Speed

from teach_once.runtime.command.frame import new_app, new_console, run_command
from teach_once.runtime.command.options import CachesOrUrl, can_be_quiet
from teach_once.runtime.machine.urls import ObjectUrl, path_or_url
from teach_once.runtime.safe.files import write_atomically
from teach_once.runtime.safe.text import visible
from teach_once.store.errors import CacheError, RemoteFix
from teach_once.store.format.certificate import certificate_text
from teach_once.store.inspect.inspect import (
    describe_missing,
    details,
    info_text,
    list_text,
    overviews,
)
from teach_once.store.move.convert import convert_cache
from teach_once.store.move.hdf5 import export_cache, import_cache
from teach_once.store.move.trim import trim_cache
from teach_once.store.read.evaluation import evaluation_names, evaluation_path, parent_faults
from teach_once.store.read.reader import TeacherCache
from teach_once.store.read.source import Source, open_source

app = new_app("Inspect, check, move and shrink caches.")
_SHOWN_FAULTS = 20
CACHES = Path("caches")


def cache_named(text: str | Path) -> Path:
    """Return the path or URL of a cache, which may be given as its teacher's name.

    `digits-resnet20` is the only folder `caches/digits-resnet20-1a2b3c4d`, unless a path of that
    name exists. Raises CacheError if several caches have the teacher's name.
    """
    path = path_or_url(text)
    if isinstance(path, ObjectUrl) or len(path.parts) != 1 or os.path.lexists(path):
        return path
    pattern = re.compile(rf"{re.escape(path.name)}-[0-9a-f]{{8}}")
    found = sorted(each for each in CACHES.glob("*") if pattern.fullmatch(each.name))
    if len(found) > 1:
        names = ", ".join(map(str, found))
        raise CacheError(f"several caches of {path}: {names}", fix="name one of these folders")
    return found[0] if found else path


CachePath = Annotated[
    Path,
    typer.Argument(
        help="teacher's name, cache folder, exported .h5 file, or s3://bucket/prefix/cache",
        parser=cache_named,
    ),
]


@app.command("list")
def list_caches(
    caches: CachesOrUrl = Path("caches"),
) -> None:
    """List the caches in a folder, or below a URL."""
    found = list(overviews(caches))
    new_console().print(list_text(found) if found else f"{caches} contains no cache")


@app.command()
def info(
    path: CachePath,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON for other programs")] = False,
    plot: Annotated[Path | None, typer.Option(help="PNG file for a picture of the cache")] = None,
) -> None:
    """Print a cache's contents and completeness."""
    found = details(path)
    if plot is not None:
        from teach_once.store.inspect.picture import picture

        write_atomically(plot, picture(TeacherCache.open(path)))
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        new_console().print(info_text(found) + (f"\npicture: {plot}" if plot else ""))


@app.command()
def check(
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PATH]...", help="teachers' names, folders, .h5 files or URLs"),
    ] = None,
    caches: Annotated[
        Path,
        typer.Option(
            metavar="PATH",
            help="folder or URL whose caches are checked if no PATH is given",
            parser=path_or_url,
        ),
    ] = Path("caches"),
) -> None:
    """Read every block of every tap and compare its checksum."""
    console = new_console()
    given = [cache_named(path) for path in paths or ()]
    given = given or [found.path for found in overviews(caches)]
    given = [each for path in given for each in (path, *_evaluations(path))]
    if not given:
        console.print(f"{caches} contains no cache")
    statuses = [_checked(path, console) for path in given]
    if len(given) > 1:
        console.print(f"{statuses.count(0)} of {len(given)} caches are valid")
    if any(statuses):
        raise typer.Exit(2 if set(statuses) == {2} else 1)


def _evaluations(path: Path) -> list[Path]:
    """Return the evaluation caches inside a cache; [] if they cannot be listed."""
    try:
        return [evaluation_path(path, name) for name in evaluation_names(path)]
    except (CacheError, OSError):
        return []  # checking the cache itself reports the error


def _checked(path: Path, console: Console) -> int:
    """Check one cache and print its faults; return 0 if valid, 1 if invalid, 2 if unusable."""
    try:
        return _is_invalid(path, console)
    except CacheError as error:
        print(visible(f"error: {error}"), file=sys.stderr)
    except OSError as error:
        print(visible(f"error: {path} cannot be read: {error}"), file=sys.stderr)
    return 2


def _is_invalid(path: Path, console: Console) -> bool:
    source = open_source(path)
    faults = describe_missing(source, _SHOWN_FAULTS)
    num_missing = source.coverage.num_missing()
    started, num_bytes = time.perf_counter(), 0
    with _bytes_progress(source, console) as progress:
        task = progress.add_task("check", total=_disk_bytes(source))

        def on_chunk(size: int) -> None:
            nonlocal num_bytes
            num_bytes += size
            progress.advance(task, size)

        faults += source.faults(every_byte=True, on_chunk=on_chunk)
    faults += parent_faults(path, source.manifest.identity)
    for line in source.unreadable_lines:  # harmless after their blocks are committed again
        console.print(f"unreadable line of the journal: {line}")
    for fault in faults[:_SHOWN_FAULTS]:
        console.print(str(fault))
    num_faults = len(faults) + max(num_missing - _SHOWN_FAULTS, 0)
    rate = num_bytes / max(time.perf_counter() - started, 1e-9)
    if faults:
        count = f"{num_faults:,} {'fault' if num_faults == 1 else 'faults'}"
        console.print(f"{path} is invalid: {count}\n{_repair_text(source)}")
        return True
    console.print(f"{path} is valid: {num_bytes:,} bytes, {rate / 1e9:,.2f} GB/s")
    return False


def _repair_text(source: Source) -> str:
    fix = source.fix
    if isinstance(fix, str):
        return f"  fix: {fix}"
    also = f"  {fix.also}\n" if isinstance(fix, RemoteFix) else ""
    return (
        f"  if it was made with ARGS, or from a YAML file of another name, repeat them\n"
        f"{also}  fix: {fix}"
    )


@app.command()
def export(
    cache: CachePath,
    file: Annotated[Path, typer.Argument(metavar="FILE.h5", help="output file")],
) -> None:
    """Write a cache as one HDF5 file."""
    export_cache(cache, file)
    new_console().print(f"{file}: {file.stat().st_size:,} bytes")


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE.h5", help="exported file")],
    caches: Annotated[Path, typer.Argument(help="parent folder of the new cache")] = Path("caches"),
) -> None:
    """Make a cache folder from an exported file."""
    new_console().print(f"{import_cache(file, caches)} is complete")


@app.command()
@can_be_quiet
def copy(
    cache: CachePath,
    dest: Annotated[
        Path,
        typer.Argument(
            metavar="DEST",
            help="parent folder of the copy, or s3://bucket/prefix",
            parser=path_or_url,
        ),
    ],
) -> None:
    """Copy a cache, verify each chunk, and skip existing chunks."""
    from teach_once.runtime.command.progress import Progress as Counted
    from teach_once.store.move.copy import copy_cache, num_chunks

    console, opened = new_console(), TeacherCache.open(cache)
    with Counted(num_chunks(opened.manifest), "chunks", console) as progress:
        made, counts = copy_cache(opened, dest, progress.advance)
    console.print(f"{made} is complete: {counts.copied:,} chunks copied, {counts.kept:,} existed")


@app.command()
@can_be_quiet
def convert(
    cache: CachePath,
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="folder of the new cache")],
    logits: Annotated[
        str | None, typer.Option(help="float16, uint8, or top:32 for the 32 largest")
    ] = None,
    channel_means: Annotated[str | None, typer.Option(help="float16 or uint8")] = None,
) -> None:
    """Make a smaller cache from a full one, without the teacher."""
    from teach_once.runtime.command.progress import Progress as Rows

    console, m = new_console(), open_source(cache).manifest
    with Rows(m.num_views * m.num_samples, "records", console) as progress:
        made = convert_cache(
            cache, dest, logits=logits, channel_means=channel_means, on_block=progress.advance
        )
    console.print(
        f"{dest} is complete: {made.manifest.record_bytes:,} bytes per record instead of "
        f"{m.record_bytes:,}"
    )
    console.print(certificate_text(made.measured))


@app.command()
def trim(
    cache: Annotated[
        Path, typer.Argument(help="teacher's name or cache folder", parser=cache_named)
    ],
    views: Annotated[int | None, typer.Option(min=1, help="views to keep; default: all")] = None,
    drop_taps: Annotated[
        str,
        typer.Option(help="taps to delete, separated by commas: attention, attention1, hint, ..."),
    ] = "",
) -> None:
    """Delete views and opt-in taps, including planned ones that were never finished."""
    freed = trim_cache(cache, num_views=views, drop_taps=[t for t in drop_taps.split(",") if t])
    manifest = open_source(cache).manifest
    new_console().print(
        f"{cache}: {manifest.num_views} views of {', '.join(manifest.taps)}; {freed:,} bytes freed"
    )


def _disk_bytes(source: Source) -> int:
    m = source.manifest
    block = sum(map(m.chunk_file_bytes, m.arrays.values()))
    return block * m.num_views * m.blocks_per_view


def _bytes_progress(source: Source, console: Console) -> Progress:
    return Progress(
        BarColumn(),
        DownloadColumn(),
        Speed(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def cli(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_command(app, arguments)
