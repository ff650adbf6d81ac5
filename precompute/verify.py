"""python -m precompute.verify NAME|PATH [--records 512] [--seed S] [--cache PATH] [key=value ...]

Verifies a cache: runs the teacher again on records drawn at random and compares. Also replays the
pixel canary, and compares the labels and the stored `correct` bits with what was recorded.

With --every-sample, without the teacher: compares every sample's bytes with the cache's checksums.

The tolerance of a tap is the rounding of its dtype, plus the difference that another composition of
batches makes in the recorded precision, relative to the tap's largest value among the records.
"""

from __future__ import annotations

import secrets
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from configs.commands import cache_command
from precompute.compare import compare_records, compare_samples
from precompute.setup import prepare
from runtime.commands import new_app, new_console, run_command
from runtime.options import (
    MIRROR,
    MIRROR_GB,
    CacheOrUrl,
    CachesOrUrl,
    Device,
    MirrorFolder,
    MirrorSize,
    Overrides,
    TeacherName,
    Workers,
)
from store.errors import fixes_spelled_by
from store.find import find_cache
from store.look import agreement
from store.mirror import local_caches, shown_path
from store.reader import TeacherCache
from views.canary import pixel_canary

app = new_app()
_LARGEST_SEED = 2**63 - 1


@app.command()
def main(
    name: TeacherName,
    overrides: Overrides = None,
    records: Annotated[int, typer.Option(min=1, help="how many records to compute again")] = 512,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, max=_LARGEST_SEED, help="chooses the records; default: random, and printed"
        ),
    ] = None,
    caches: CachesOrUrl = Path("caches"),
    cache: CacheOrUrl = None,
    mirror: MirrorFolder = MIRROR,
    mirror_gb: MirrorSize = MIRROR_GB,
    device: Device = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="images per forward pass")] = 256,
    workers: Workers = None,
    every_sample: Annotated[
        bool, typer.Option("--every-sample", help="compare the checksums of all images instead")
    ] = False,
) -> None:
    """Compute some records of a cache again and compare."""
    console = new_console()
    folder, path = local_caches(caches, cache, mirror, mirror_gb)
    setup = prepare(name, overrides or [], folder)
    train = setup.dataset.train
    with fixes_spelled_by(lambda more: cache_command(setup.config, caches_dir=caches, more=more)):
        opened = (
            TeacherCache.open(path)
            if path
            else find_cache(folder, setup.config.name, setup.identity)
        )
        if every_sample:
            raise typer.Exit(compare_samples(train, opened, console))
        canary = pixel_canary(train, setup.config.views)
        opened.refuse_unless(setup.identity, labels=train.labels, canary=canary)

    from precompute.teacher_pass import PassOptions, TeacherPass
    from runtime.devices import pick_device

    console.print(
        f"{shown_path(opened.path)}: identity, {len(train):,} labels and the pixel canary agree"
    )
    teacher_pass = TeacherPass(
        setup, PassOptions(pick_device(device), batch_size, num_workers=workers)
    )
    if seed is None:  # a forger must not know which records will be compared
        seed = secrets.randbelow(_LARGEST_SEED)
    if records < (total := opened.num_samples * opened.num_views):
        console.print(f"{records:,} records drawn at random; to draw the same again: --seed {seed}")
    else:
        records = total
        console.print(f"all {records:,} records")
    results = compare_records(setup, opened, teacher_pass, records, seed)
    console.print(f"{'tap':<10} {'largest error':>14} {'tolerance':>12} {'exceeding':>10}")
    for result in results:
        console.print(
            f"{result.tap:<10} {result.largest_error:>14.3g} {result.tolerance:>12.3g} "
            f"{result.num_wrong:>10,}"
        )
    wrong = [result.tap for result in results if result.num_wrong]
    if "correct" in opened.taps and not _agreement_is_as_recorded(opened, console):
        wrong.append("train_agreement")
    if wrong:
        console.print(f"NOT the teacher's outputs: {', '.join(wrong)}")
        raise typer.Exit(1)
    console.print(f"sound: {records:,} records were computed again and agree")


def _agreement_is_as_recorded(cache: TeacherCache, console: Console) -> bool:
    stored = agreement(cache, cache.manifest.measured_views or cache.num_views)
    recorded = cache.measured.get("train_agreement")
    known = "nothing" if recorded is None else f"{recorded:.6f}"
    console.print(f"teacher is right on {stored:.6f} of the cached records; recorded: {known}")
    return recorded is not None and abs(stored - recorded) <= 1e-9


def cli(arguments: list[str] | None = None) -> int:
    """Run the command line: 0 agrees, 1 does not, 2 cannot be compared."""
    return run_command(app, arguments)


if __name__ == "__main__":
    sys.exit(cli())
