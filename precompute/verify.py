"""python -m precompute.verify NAME|PATH [--records 512] [--cache PATH] [key=value ...]

Verifies a cache: runs the teacher again on records chosen at random and compares. Also replays the
pixel canary, and compares the labels and the stored `correct` bits with what was recorded.

With --every-sample, without the teacher: compares every sample's bytes with the cache's checksums.

The tolerance of a tap is the rounding of its dtype, plus the difference that another composition of
batches makes in the recorded precision, relative to the tap's largest value among the records.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console

from configs.commands import cache_command
from nets.taps import taps_stored
from precompute.setup import Setup, prepare
from runtime.commands import new_app, new_console, run_command
from runtime.options import Caches, Device, Overrides, TeacherName, Workers
from runtime.progress import Progress
from store.errors import CacheMismatch, fixes_spelled_by
from store.find import find_cache
from store.look import agreement
from store.reader import WITHOUT_CHECKSUMS, TeacherCache
from views.canary import pixel_canary
from views.changes import changed_samples
from views.seeds import draws
from views.splits import Split

if TYPE_CHECKING:  # loads torch
    from precompute.teacher_pass import TeacherPass

app = new_app()

# Half of the last bit kept, relative to a number's size.
_ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11}
# What the arithmetic of another batch may differ by, relative to the tap's largest value.
_ARITHMETIC = {"float32": 1e-4, "tf32": 5e-3, "float16": 1e-2, "bfloat16": 4e-2}
_CHECKS_STREAM = 3


@dataclass(frozen=True)
class TapResult:
    """The largest difference of a tap, and the largest that its tolerance allows there."""

    tap: str
    largest_error: float
    tolerance: float
    num_wrong: int


@app.command()
def main(
    name: TeacherName,
    overrides: Overrides = None,
    records: Annotated[int, typer.Option(min=1, help="how many records to compute again")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="chooses the records")] = 0,
    caches: Caches = Path("caches"),
    cache: Annotated[
        Path | None, typer.Option(help="verify this cache instead of one in --caches")
    ] = None,
    device: Device = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="images per forward pass")] = 256,
    workers: Workers = None,
    every_sample: Annotated[
        bool, typer.Option("--every-sample", help="compare the checksums of all images instead")
    ] = False,
) -> None:
    """Compute some records of a cache again and compare."""
    console = new_console()
    setup = prepare(name, overrides or [], caches)
    train = setup.dataset.train
    with fixes_spelled_by(lambda more: cache_command(setup.config, caches_dir=caches, more=more)):
        opened = (
            TeacherCache.open(cache)
            if cache
            else find_cache(caches, setup.config.name, setup.identity)
        )
        if every_sample:
            raise typer.Exit(compare_samples(train, opened, console))
        canary = pixel_canary(train, setup.config.views)
        opened.refuse_unless(setup.identity, labels=train.labels, canary=canary)

    from precompute.teacher_pass import PassOptions, TeacherPass
    from runtime.devices import pick_device

    console.print(f"{opened.path}: identity, {len(train):,} labels and the pixel canary agree")
    teacher_pass = TeacherPass(
        setup, PassOptions(pick_device(device), batch_size, num_workers=workers)
    )
    results = compare_records(setup, opened, teacher_pass, records, seed)
    console.print(f"{'tap':<10} {'largest error':>14} {'tolerance':>12} {'exceeding':>10}")
    for result in results:
        console.print(
            f"{result.tap:<10} {result.largest_error:>14.3g} {result.tolerance:>12.3g} "
            f"{result.num_wrong:>10,}"
        )
    wrong = [result.tap for result in results if result.num_wrong]
    stored = agreement(opened, opened.manifest.measured_views or opened.num_views)
    recorded = opened.measured.get("train_agreement")
    console.print(f"teacher is right on {stored:.6f} of the cached records; recorded: {recorded}")
    if recorded is None or abs(stored - recorded) > 1e-9:
        wrong.append("train_agreement")
    if wrong:
        console.print(f"NOT the teacher's outputs: {', '.join(wrong)}")
        raise typer.Exit(1)
    console.print(f"sound: {records:,} records were computed again and agree")


def compare_samples(split: Split, cache: TeacherCache, console: Console) -> int:
    """Read every sample's bytes and compare; 0 where all are those that the teacher saw, else 1."""
    if cache.sample_crc32c is None:
        raise CacheMismatch(f"{cache.path} {WITHOUT_CHECKSUMS}")
    if len(split) != cache.num_samples:
        raise CacheMismatch(
            f"{cache.path} has {cache.num_samples:,} samples, the dataset {len(split):,}"
        )
    changed: list[int] = []
    with Progress(len(split), "samples", console) as progress:
        ids = np.arange(len(split))
        for number, some in changed_samples(split, cache.sample_crc32c, ids):
            changed += some.tolist()
            progress.advance(number)
    for sample in changed[:5]:
        console.print(
            f"sample {sample}, {split.name_of(sample)}: not the bytes that the teacher saw"
        )
    if changed:
        console.print(f"{len(changed):,} of {len(split):,} samples have changed")
        return 1
    console.print(f"{cache.path}: all {len(split):,} samples are the ones that the teacher saw")
    return 0


def compare_records(
    setup: Setup, cache: TeacherCache, teacher_pass: TeacherPass, num_records: int, seed: int
) -> list[TapResult]:
    """Compute `num_records` random (sample, view) pairs again; one result per tap of the cache."""
    words = draws(seed, 0, num_records, 2, stream=_CHECKS_STREAM)
    samples = (words[:, 0] % np.uint64(cache.num_samples)).astype(np.int64)
    views = (words[:, 1] % np.uint64(cache.num_views)).astype(np.int64)
    fresh: dict[str, list[NDArray[np.float32]]] = {tap: [] for tap in cache.taps}
    stored: dict[str, list[NDArray[np.float32]]] = {tap: [] for tap in cache.taps}
    rounding: dict[str, list[NDArray[np.float32]]] = {tap: [] for tap in cache.taps}
    for view in np.unique(views):
        ids = samples[views == view]
        found = teacher_pass.records(int(view), ids, taps_stored(cache.taps))
        held = cache.read(ids, int(view))
        for tap in cache.taps:
            fresh[tap].append(found[tap].float().cpu().numpy())
            stored[tap].append(held[tap].astype(np.float32))
            rounding[tap].append(_rounding(cache, tap, int(view), fresh[tap][-1]))
    margin = _margins(np.concatenate(fresh["logits"]))
    arithmetic = _ARITHMETIC[setup.config.teacher.precision]
    return [
        _compared(
            tap,
            np.concatenate(fresh[tap]),
            np.concatenate(stored[tap]),
            np.concatenate(rounding[tap]),
            arithmetic,
            margin,
        )
        for tap in cache.taps
    ]


def _compared(
    tap: str,
    fresh: NDArray[np.float32],
    stored: NDArray[np.float32],
    rounding: NDArray[np.float32],
    arithmetic: float,
    margin: NDArray[np.float32],
) -> TapResult:
    error = np.abs(fresh - stored)
    if tap == "correct":  # a bit may turn where the first two logits are all but equal
        wrong = (error > 0) & (margin > 2 * arithmetic)
        return TapResult(tap, float(error[wrong].max(initial=0)), 0.0, int(wrong.sum()))
    allowed = arithmetic * np.abs(fresh).max() + rounding
    return TapResult(tap, float(error.max()), float(allowed.max()), int((error > allowed).sum()))


def _rounding(
    cache: TeacherCache, tap: str, view: int, values: NDArray[np.float32]
) -> NDArray[np.float32]:
    """What storing may have changed each value by: half of the last bit, or half a step."""
    spec = cache.taps[tap]
    if spec.dtype == "uint8" and spec.scale is None:
        return np.zeros_like(values)
    if spec.scale is None:
        return np.asarray(np.abs(values) * _ROUNDING[spec.dtype] + 2.0**-25, dtype=np.float32)
    if spec.scale == "row":
        spread = values.max(axis=1, keepdims=True) - values.min(axis=1, keepdims=True)
    else:  # no block of the view spreads wider than the view
        of_view = cache.read_view(view, [tap])[tap]
        spread = (of_view.max(axis=0) - of_view.min(axis=0))[None]
    return np.broadcast_to(spread / 255 / 2 * 1.01, values.shape).astype(np.float32)


def _margins(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """(R,) how far the first logit is above the second, relative to the largest of all."""
    top = np.sort(logits, axis=1)
    second = top[:, -2] if logits.shape[1] > 1 else top[:, -1] - np.inf
    return np.asarray((top[:, -1] - second) / max(float(np.abs(logits).max()), 1e-12))


def cli(arguments: list[str] | None = None) -> int:
    """Run the command line: 0 agrees, 1 does not, 2 cannot be compared."""
    return run_command(app, arguments)


if __name__ == "__main__":
    sys.exit(cli())
