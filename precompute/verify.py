"""python -m precompute.verify NAME|PATH [--records 512] [--seed S] [--cache PATH] [key=value ...]

Verifies a cache: runs the teacher again on random records and compares. Also replays the pixel
canary, and compares the labels and the stored `correct` bits with the recorded agreement.

With --check-images, compares every sample's bytes with the cache's digests, without the teacher.

The tolerance of a tap is the rounding of its dtype plus the difference caused by other batches in
the recorded precision, relative to the tap's largest value among the records.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console

from teach_once.configs.commands import cache_command
from teach_once.nets.teacher.taps import taps_stored
from teach_once.precompute.compute.setup import Setup, prepare
from teach_once.runtime.command.frame import new_app, new_console, run_command
from teach_once.runtime.command.options import (
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
from teach_once.runtime.command.progress import Progress
from teach_once.store.errors import CacheMismatch, fixes_spelled_by
from teach_once.store.inspect.find import find_cache
from teach_once.store.inspect.inspect import agreement
from teach_once.store.read.mirror import local_caches, shown_path
from teach_once.store.read.reader import TeacherCache
from teach_once.views.augment.augment import pixel_canary
from teach_once.views.seeds import draws
from teach_once.views.splits import Split, changed_samples

if TYPE_CHECKING:
    from teach_once.precompute.compute.teacher_pass import TeacherPass


# Half of the last stored bit, relative to the value.
_ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11}
# Change of a value caused by other batches, relative to the tap's largest value.
_BATCHING_ERROR = {"float32": 1e-4, "tf32": 5e-3, "float16": 1e-2, "bfloat16": 4e-2}
_CHECKS_STREAM = 3
_NAMED_SAMPLES = 5


@dataclass(frozen=True)
class TapResult:
    """The largest error of a tap and its tolerance."""

    tap: str
    largest_error: float
    tolerance: float
    num_wrong: int


@dataclass(frozen=True)
class _Pair:
    """Records (R, *tap shape) of one tap: computed now, read from the cache, and rounding."""

    fresh: NDArray[np.float32]
    stored: NDArray[np.float32]
    rounding: NDArray[np.float32]


def compare_samples(split: Split, cache: TeacherCache, console: Console) -> int:
    """Compare every sample's bytes with the cache's digests; returns 0, or 1 if any differ.

    Raises CacheMismatch if the cache has another number of samples.
    """
    if len(split) != cache.num_samples:
        raise CacheMismatch(
            f"{cache.path} has {cache.num_samples:,} samples, the dataset {len(split):,}"
        )
    changed: list[int] = []
    with Progress(len(split), "samples", console) as progress:
        ids = np.arange(len(split))
        for number, some in changed_samples(split, cache.sample_digest, ids):
            changed += some.tolist()
            progress.advance(number)
    for sample in changed[:_NAMED_SAMPLES]:
        console.print(
            f"sample {sample}, {split.name_of(sample)}: changed since the cache was filled"
        )
    if changed:
        console.print(f"{len(changed):,} of {len(split):,} samples have changed")
        return 1
    console.print(f"{cache.path}: all {len(split):,} samples are unchanged")
    return 0


def compare_records(
    setup: Setup, cache: TeacherCache, teacher_pass: TeacherPass, num_records: int, seed: int
) -> list[TapResult]:
    """Compute `num_records` random (sample, view) pairs again; returns a result per tap.

    A cache with at most that many records is compared as a whole.
    """
    if num_records >= cache.num_samples * cache.num_views:
        views, samples = map(np.ravel, np.indices((cache.num_views, cache.num_samples)))
    else:
        words = draws(seed, 0, num_records, 2, stream=_CHECKS_STREAM)
        samples = (words[:, 0] % np.uint64(cache.num_samples)).astype(np.int64)
        views = (words[:, 1] % np.uint64(cache.num_views)).astype(np.int64)
    pairs: dict[str, list[_Pair]] = {tap: [] for tap in cache.taps}
    logits: list[NDArray[np.float32]] = []
    for view in map(int, np.unique(views)):
        ids = samples[views == view]
        computed = teacher_pass.records(view, ids, taps_stored(cache.taps))
        stored = cache.read(ids, view)
        for tap in cache.taps:
            fresh = computed[tap].float().cpu().numpy()
            if tap == "logits":
                logits.append(fresh)
            read = stored[tap].astype(np.float32)
            if (top := cache.taps[tap].top) is not None:
                fresh, read = _cut_alike(fresh, read, top)
            pairs[tap].append(_Pair(fresh, read, _rounding(cache, tap, view, fresh)))
    joined = {tap: _joined(parts) for tap, parts in pairs.items()}
    margin = _margins(np.concatenate(logits)) if logits else np.empty(0, np.float32)
    batching = _BATCHING_ERROR[setup.config.teacher.precision]
    return [_compared(tap, pair, batching, margin) for tap, pair in joined.items()]


def _joined(parts: Sequence[_Pair]) -> _Pair:
    return _Pair(
        np.concatenate([part.fresh for part in parts]),
        np.concatenate([part.stored for part in parts]),
        np.concatenate([part.rounding for part in parts]),
    )


def _compared(tap: str, pair: _Pair, batching: float, margin: NDArray[np.float32]) -> TapResult:
    """Compare records; a difference beyond its tolerance, or NaN, is an error."""
    error = np.abs(pair.fresh - pair.stored)
    if tap == "correct":  # a bit may flip where the two largest logits are almost equal
        wrong = ~(error <= 0) & ~(margin <= 2 * batching)
        return TapResult(tap, float(error[wrong].max(initial=0)), 0.0, int(wrong.sum()))
    allowed = batching * np.abs(pair.fresh).max() + pair.rounding
    wrong = ~(error <= allowed)
    return TapResult(tap, float(error.max()), float(allowed.max()), int(wrong.sum()))


def _cut_alike(
    fresh: NDArray[np.float32], stored: NDArray[np.float32], top: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Convert computed and stored logits (R, K) to a comparable form, (R, top + 2) each.

    The columns are the stored logits, the logsumexp of the others, and the smallest stored logit,
    which is compared with the logit that is now in its rank.
    """
    classes = np.argsort(-stored, axis=1, kind="stable")
    kept, others = classes[:, :top], classes[:, top:]
    ours, theirs = (np.take_along_axis(each, kept, axis=1) for each in (fresh, stored))
    left = np.take_along_axis(fresh, others, axis=1)
    rest = np.logaddexp.reduce(left, axis=1)
    stored_rest = np.logaddexp.reduce(np.take_along_axis(stored, others, axis=1), axis=1)
    smallest = ours.min(axis=1)
    return (
        np.column_stack([ours, rest, np.maximum(smallest, left.max(axis=1))]),
        np.column_stack([theirs, stored_rest, smallest]),
    )


def _rounding(
    cache: TeacherCache, tap: str, view: int, values: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return how much storage may change each value: half of the last bit, or half a step."""
    spec = cache.taps[tap]
    if spec.dtype == "uint8" and spec.scale is None:
        return np.zeros_like(values)
    if spec.scale is None:
        return np.asarray(np.abs(values) * _ROUNDING[spec.dtype] + 2.0**-25, dtype=np.float32)
    if spec.scale == "row":
        spread = values.max(axis=1, keepdims=True) - values.min(axis=1, keepdims=True)
    else:  # no block has a wider range than its view
        of_view = cache.read_view(view, [tap])[tap]
        spread = (of_view.max(axis=0) - of_view.min(axis=0))[None]
    return np.broadcast_to(spread / 255 / 2 * 1.01, values.shape).astype(np.float32)


def _margins(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return (R,), the difference of the two largest logits relative to the largest magnitude."""
    top = np.sort(logits, axis=1)
    second = top[:, -2] if logits.shape[1] > 1 else top[:, -1] - np.inf
    return np.asarray((top[:, -1] - second) / max(float(np.abs(logits).max()), 1e-12))


app = new_app()
_LARGEST_SEED = 2**63 - 1


@app.command()
def main(
    name: TeacherName,
    overrides: Overrides = None,
    records: Annotated[int, typer.Option(min=1, help="number of records to compute again")] = 512,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, max=_LARGEST_SEED, help="seed of the selection; default: random, and printed"
        ),
    ] = None,
    caches: CachesOrUrl = Path("caches"),
    cache: CacheOrUrl = None,
    mirror: MirrorFolder = MIRROR,
    mirror_gb: MirrorSize = MIRROR_GB,
    device: Device = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="images per forward pass")] = 256,
    workers: Workers = None,
    check_images: Annotated[
        bool, typer.Option("--check-images", help="compare the digests of all images instead")
    ] = False,
) -> None:
    """Compute some records of a cache again and compare them."""
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
        if check_images:
            raise typer.Exit(compare_samples(train, opened, console))
        canary = pixel_canary(train, setup.config.views)
        opened.refuse_unless(setup.identity, labels=train.labels, canary=canary)

    from teach_once.precompute.compute.teacher_pass import PassOptions, TeacherPass
    from teach_once.runtime.machine.devices import pick_device

    of_labels = "" if train.labels is None else f", {len(train):,} labels"
    console.print(f"{shown_path(opened.path)}: identity{of_labels} and the pixel canary agree")
    teacher_pass = TeacherPass(
        setup, PassOptions(pick_device(device), batch_size, num_workers=workers)
    )
    if seed is None:  # a forger must not know the compared records
        seed = secrets.randbelow(_LARGEST_SEED)
    if records < (total := opened.num_samples * opened.num_views):
        console.print(f"{records:,} random records; to compare the same ones again: --seed {seed}")
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
        console.print(f"DIFFERS from the teacher's outputs: {', '.join(wrong)}")
        raise typer.Exit(1)
    console.print(f"valid: {records:,} records were computed again and agree")


def _agreement_is_as_recorded(cache: TeacherCache, console: Console) -> bool:
    stored = agreement(cache, cache.manifest.measured_views or cache.num_views)
    recorded = cache.measured.get("train_agreement")
    known = "nothing" if recorded is None else f"{recorded:.6f}"
    console.print(f"teacher agrees with the label on {stored:.6f} of records; recorded: {known}")
    return recorded is not None and abs(stored - recorded) <= 1e-9


def cli(arguments: list[str] | None = None) -> int:
    """Run the command line; returns 0 if records agree, 1 if not, 2 if they cannot be compared."""
    return run_command(app, arguments)


if __name__ == "__main__":
    sys.exit(cli())
