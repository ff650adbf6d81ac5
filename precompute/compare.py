"""Compares a cache with the teacher and the dataset that it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from nets.taps import taps_stored
from precompute.setup import Setup
from runtime.progress import Progress
from store.errors import CacheMismatch
from store.reader import WITHOUT_CHECKSUMS, TeacherCache
from views.changes import changed_samples
from views.seeds import draws
from views.splits import Split

if TYPE_CHECKING:  # loads torch
    from precompute.teacher_pass import TeacherPass

# Half of the last bit that is stored, relative to the value.
_ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11}
# How much another composition of batches may change a value, relative to the tap's largest one.
_BATCHING_ERROR = {"float32": 1e-4, "tf32": 5e-3, "float16": 1e-2, "bfloat16": 4e-2}
_CHECKS_STREAM = 3
_NAMED_SAMPLES = 5


@dataclass(frozen=True)
class TapResult:
    """The largest error of a tap, and the largest that its tolerance allows."""

    tap: str
    largest_error: float
    tolerance: float
    num_wrong: int


@dataclass(frozen=True)
class _Pair:
    """Records of one tap, (R, *tap shape) each: computed now, read, and what storing may change."""

    fresh: NDArray[np.float32]
    stored: NDArray[np.float32]
    rounding: NDArray[np.float32]


def compare_samples(split: Split, cache: TeacherCache, console: Console) -> int:
    """Compare every sample's bytes with the cache's checksums; exit status 0, or 1 if some differ.

    Raises CacheMismatch where the cache has no checksums, or another number of samples.
    """
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
    for sample in changed[:_NAMED_SAMPLES]:
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
    """Compute `num_records` random (sample, view) pairs again; one result per tap of the cache.

    Of a cache that has no more than these, every record once.
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
    """What is not within its tolerance is wrong: so is NaN, which compares as nothing."""
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
    """Cut logits (R, K), computed now and as read back, in a form that can be compared.

    (R, top + 2) of each: the logits that are stored, the logsumexp of the others, and the smallest
    that is stored, beside the largest now if that is another one.
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
    """How much storing may have changed each value: half of the last bit, or half a step."""
    spec = cache.taps[tap]
    if spec.dtype == "uint8" and spec.scale is None:
        return np.zeros_like(values)
    if spec.scale is None:
        return np.asarray(np.abs(values) * _ROUNDING[spec.dtype] + 2.0**-25, dtype=np.float32)
    if spec.scale == "row":
        spread = values.max(axis=1, keepdims=True) - values.min(axis=1, keepdims=True)
    else:  # no block has a wider range than its whole view
        of_view = cache.read_view(view, [tap])[tap]
        spread = (of_view.max(axis=0) - of_view.min(axis=0))[None]
    return np.broadcast_to(spread / 255 / 2 * 1.01, values.shape).astype(np.float32)


def _margins(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """(R,) the difference of the two largest logits, relative to the largest of all."""
    top = np.sort(logits, axis=1)
    second = top[:, -2] if logits.shape[1] > 1 else top[:, -1] - np.inf
    return np.asarray((top[:, -1] - second) / max(float(np.abs(logits).max()), 1e-12))
