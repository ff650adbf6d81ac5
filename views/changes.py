"""How a dataset differs from the one that a cache was made from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from views.seeds import choice
from views.splits import Checksums, Ids, Split

_READ_AT_ONCE = 512
_LOOKED_AT = 256  # of a dataset that may be another one
_MOST_READ = 20_000  # to find the first difference: seconds, also on a slow disk


def changed_samples(split: Split, checksums: Checksums, ids: Ids) -> Iterator[tuple[int, Ids]]:
    """Read the bytes of samples `ids` anew, a few at a time: how many, and which have changed.

    checksums: (N,) uint32 of all samples, as a cache keeps them. Raises DatasetError where one
    cannot be read.
    """
    for start in range(0, len(ids), _READ_AT_ONCE):
        some = ids[start : start + _READ_AT_ONCE]
        yield len(some), some[split.read_checksums(some) != checksums[some]]


def is_other_dataset(
    split: Split,
    class_names: Sequence[str],
    labels: Ids,
    checksums: Checksums | None,
    names: Sequence[str],
) -> bool:
    """Return True if a cache was made from other images, not from another state of these.

    class_names: this dataset's; labels (N,) int64, checksums (N,) uint32 or None, names: the
    cache's. Some samples of this dataset are read.
    """
    if list(class_names) == list(names) and np.array_equal(split.labels, labels):
        return False
    if checksums is None:
        return list(class_names) != list(names)
    some = choice(0, len(split), min(_LOOKED_AT, len(split)))
    return not np.isin(split.read_checksums(np.sort(some)), checksums).any()


def describe_change(split: Split, labels: Ids, checksums: Checksums | None) -> str:
    """`799 samples, were 800; first difference: sample 412, <file>`.

    labels: (N,) int64 and checksums: (N,) uint32 or None, as the cache keeps them. Reads no more
    than 20,000 samples.
    """
    now, before = len(split), len(labels)
    common = min(now, before)
    counts = f"{now:,} samples, " + (f"were {before:,}" if now != before else "as before")
    other_labels = np.flatnonzero(split.labels[:common] != labels[:common])
    stop = int(other_labels[0]) if len(other_labels) else common
    has_moved = len(other_labels) > 0 or now != before
    first = stop if has_moved else None
    if checksums is not None:
        start = _start_of_class(labels, stop) if has_moved else 0
        looked_at = np.arange(start, min(stop, start + _MOST_READ))
        found = (changed for _, changed in changed_samples(split, checksums, looked_at))
        first = next((int(changed[0]) for changed in found if len(changed)), first)
    if first is None:
        return f"{counts}; no difference found in what is in them, only in names or order"
    if first == now:
        return f"{counts}; those that are left are as before"
    return f"{counts}; first difference: sample {first}, {split.name_of(first)}"


def _start_of_class(labels: Ids, stop: int) -> int:
    """Where the run of equal labels that ends before `stop` begins."""
    others = np.flatnonzero(labels[:stop] != labels[max(stop - 1, 0)])
    return int(others[-1]) + 1 if len(others) else 0
