"""python -m store list [--caches DIR]                 all caches: teacher, size, how far
python -m store info PATH [--json] [--plot FILE]     one cache: identity, taps, bytes, versions
python -m store check [PATH ...]                     read every byte of them; default: of all caches
python -m store export CACHE FILE.h5                 as one HDF5 file
python -m store import FILE.h5 [DIR]                 and back
python -m store trim CACHE [--views 4] [--drop-taps energy,hint]     make a cache smaller

Exit status: 0 sound, 1 unsound or unfinished, 2 unusable.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn
from rich.progress import TransferSpeedColumn as Speed

from runtime.commands import new_app, new_console, run_command
from runtime.files import write_atomically
from store.errors import CacheError, make_command
from store.look import describe_missing, details, journal_notes, overviews
from store.reader import TeacherCache, open_source
from store.transfer import export_cache, import_cache
from store.trim import trim_cache

app = new_app("Look at caches.")
CachePath = Annotated[Path, typer.Argument(help="a cache's folder, or an exported .h5 file")]


@app.command("list")
def list_caches(
    caches: Annotated[Path, typer.Option(help="folder of the caches")] = Path("caches"),
) -> None:
    """All caches below a folder."""
    rows = [["cache", "teacher", "dataset", "views", "samples", "size", "state"]]
    for found in overviews(caches):
        if found.source is None:
            rows.append([found.path.name, "", "", "", "", "", f"unusable: {found.problem}"])
            continue
        m = found.source.manifest
        size = m.record_bytes * m.num_views * m.num_samples
        rows.append(
            [
                found.path.name,
                m.identity["teacher"]["arch"],
                m.identity["dataset"]["type"],
                str(m.num_views),
                f"{m.num_samples:,}",
                f"{size / 1e6:,.1f} MB",
                "complete" if found.done == 1 else f"{100 * found.done:.1f} % done",
            ]
        )
    print(_aligned(rows) if len(rows) > 1 else f"{caches} holds no cache")


@app.command()
def info(
    path: CachePath,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
    plot: Annotated[Path | None, typer.Option(help="draw a picture into this PNG file")] = None,
) -> None:
    """What one cache is, and how far."""
    found = details(path)
    if plot is not None:
        from store.picture import picture

        write_atomically(plot, picture(TeacherCache.open(path)))
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        _console().print(_as_text(found) + (f"\npicture: {plot}" if plot else ""))


@app.command()
def check(
    paths: Annotated[list[Path] | None, typer.Argument(help="folders or .h5 files")] = None,
    caches: Annotated[Path, typer.Option(help="without PATH: all below it")] = Path("caches"),
) -> None:
    """Read every block of every tap and compare the checksums; of all, whatever is found."""
    console = _console()
    given = paths or [found.path for found in overviews(caches)]
    if not given:
        console.print(f"{caches} holds no cache")
    statuses = [_checked(path, console) for path in given]
    if len(given) > 1:
        console.print(f"{statuses.count(0)} of {len(given)} caches are sound")
    if any(statuses):
        raise typer.Exit(2 if set(statuses) == {2} else 1)


def _checked(path: Path, console: Console) -> int:
    """Check one cache and say what was found: 0 sound, 1 unsound, 2 unusable."""
    try:
        return _is_unsound(path, console)
    except CacheError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _is_unsound(path: Path, console: Console) -> bool:
    source = open_source(path)
    faults = describe_missing(source)
    started, num_bytes = time.perf_counter(), 0
    with _bytes_progress(source, console) as progress:
        task = progress.add_task("check", total=_disk_bytes(source))

        def on_chunk(size: int) -> None:
            nonlocal num_bytes
            num_bytes += size
            progress.advance(task, size)

        faults += source.faults(read=True, on_chunk=on_chunk)
    for note in journal_notes(source):
        console.print(f"unreadable line of the journal: {note}")
    for fault in faults[:20]:
        console.print(str(fault))
    rate = num_bytes / max(time.perf_counter() - started, 1e-9)
    if faults:
        console.print(
            f"{path} is unsound: {len(faults)} faults\n  if it was made with ARGS or from a file "
            f"elsewhere, name them again\n  fix: "
            f"{_recheck_command(path, source.manifest.teacher)}"
        )
        return True
    console.print(f"{path} is sound: {num_bytes:,} bytes, {rate / 1e9:,.2f} GB/s")
    return False


def _recheck_command(path: Path, teacher: str) -> str:
    caches = "" if path.parent == Path("caches") else str(path.parent)
    return make_command(teacher, RECHECK="1", CACHES=caches)


@app.command()
def export(cache: CachePath, file: Annotated[Path, typer.Argument(help="FILE.h5")]) -> None:
    """Write a cache as one HDF5 file."""
    export_cache(cache, file)
    _console().print(f"{file}: {file.stat().st_size:,} bytes")


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="FILE.h5")],
    caches: Annotated[Path, typer.Argument(help="folder of the caches")] = Path("caches"),
) -> None:
    """Make a cache folder from an exported file."""
    _console().print(f"{import_cache(file, caches)} is complete")


@app.command()
def trim(
    cache: Annotated[Path, typer.Argument(help="a cache's folder")],
    views: Annotated[int | None, typer.Option(min=1, help="views to keep; default: all")] = None,
    drop_taps: Annotated[
        str, typer.Option(help="energy, energy1, hint, ...; several with commas between")
    ] = "",
) -> None:
    """Drop views and opt-in taps for good, also those of a growth that was given up."""
    freed = trim_cache(cache, num_views=views, drop_taps=[t for t in drop_taps.split(",") if t])
    manifest = open_source(cache).manifest
    _console().print(
        f"{cache}: {manifest.num_views} views of {', '.join(manifest.taps)}; {freed:,} bytes freed"
    )


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[-1] = 0
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def _as_text(found: dict[str, Any]) -> str:
    lines = [
        f"{found['path']}",
        f"identity   {found['identity_sha256']}",
        *_flat(found["identity"]),
        f"size       {found['num_views']} views x {found['num_samples']:,} samples x "
        f"{found['bytes_per_record']:,} bytes = {found['bytes']:,} bytes, in blocks of "
        f"{found['block_rows']:,}",
    ]
    for name, tap in found["taps"].items():
        shape = "x".join(map(str, tap["shape"])) or "1"
        scale = f" with a scale per {tap['scale']}" if tap["scale"] else ""
        lines.append(
            f"  {name:<9}{shape:>14} {tap['dtype']}{scale}, {tap['bytes_per_record']:,} bytes a "
            f"record, {tap['bytes']:,} in all"
        )
    state = "complete" if found["complete"] else f"{100 * found['fraction_done']:.1f} % done"
    lines.append(f"state      {state}")
    lines += [f"{name:<22} {value:.4g}" for name, value in found["measured"].items()]
    lines.append("made with  " + ", ".join(f"{k} {v}" for k, v in found["versions"].items()))
    return "\n".join(lines)


def _flat(mapping: dict[str, Any], prefix: str = "  ") -> list[str]:
    lines: list[str] = []
    for key, value in mapping.items():
        if isinstance(value, dict):
            lines += _flat(value, f"{prefix}{key}.")
        else:
            lines.append(f"{prefix}{key}: {value}")
    return lines


def _disk_bytes(source: Any) -> int:
    m = source.manifest
    block = sum(map(m.chunk_file_bytes, m.arrays.values()))
    return int(block * m.num_views * m.blocks_per_view)


def _bytes_progress(source: Any, console: Console) -> Progress:
    return Progress(
        BarColumn(),
        DownloadColumn(),
        Speed(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def _console() -> Console:
    return new_console()


def cli(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_command(app, arguments)


if __name__ == "__main__":
    sys.exit(cli())
