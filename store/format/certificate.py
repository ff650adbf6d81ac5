"""The certificate in a cache's manifest: the error of reduced records against full ones.

A pass compares the teacher's outputs with the stored ones. A conversion compares the old cache's
records with the new ones. `python -m train.certify` compares losses.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teach_once.store.format.spec import Block, TapSpec, kind_of

MOST_RECORDS = 4096
_PARTS = 64  # minimum number of blocks with records
RECORDS, STEPS = "certified_records", "certified_steps"  # STEPS: of the trained student
TEMPERATURES = (1, 4)
LOSSES, STUDENTS = ("cd", "kd", "gkd"), ("untrained", "trained")
LOSS_CHANGES = tuple(f"{loss}_change_{student}" for student in STUDENTS for loss in LOSSES)
_INFINITE = float("inf")
RANGES = {  # valid ranges of the metrics in a manifest
    RECORDS: (1, MOST_RECORDS),
    **{f"kl_t{temperature}": (0.0, _INFINITE) for temperature in TEMPERATURES},
    "means_largest_error": (0.0, _INFINITE),
    "means_mean_error": (0.0, _INFINITE),
    **dict.fromkeys(LOSS_CHANGES, (-1.0, _INFINITE)),
    STEPS: (1, 10**12),
}
Records = Mapping[str, NDArray[Any]]  # tap -> (R, ...)


def is_reduced(spec: TapSpec) -> bool:
    """Return True if a tap is stored as codes, or truncated to its largest values."""
    return spec.top is not None or spec.scale is not None


def certified_blocks(blocks: Iterable[Block]) -> list[Block]:
    """Return a fixed selection of these blocks, in order, each with the same number of first rows.

    Many datasets are sorted by class, so the first samples would cover few classes. With at most
    MOST_RECORDS records, all are returned.
    """
    every = list(blocks)
    num_blocks = min(len(every), max(_PARTS, math.ceil(MOST_RECORDS / every[0].rows)))
    most = MOST_RECORDS // num_blocks
    chosen = sorted(random.Random(0).sample(every, num_blocks))
    return [replace(block, stop=min(block.stop, block.start + most)) for block in chosen]


def certificate_in(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return the certificate's metrics in their order; {} if there are none."""
    return {key: measured[key] for key in RANGES if key in measured}


class Comparison:
    """Accumulates, batch by batch, the difference between stored and full records."""

    def __init__(self) -> None:
        self._records = 0
        self._kl = dict.fromkeys(TEMPERATURES, 0.0)
        self._has_logits = False
        self._num_means, self._sum, self._largest = 0, 0.0, 0.0

    def add(self, full: Records, stored: Records) -> None:
        """Add R records in both forms. Taps: "logits" (R, K), "stageN" (R, C), or some of them."""
        for tap, values in stored.items():
            if tap == "logits":
                self._has_logits = True
                for temperature in TEMPERATURES:
                    self._kl[temperature] += float(_kl(full[tap], values, temperature).sum())
            elif kind_of(tap) == "stage":
                errors = np.abs(full[tap].astype(np.float64) - values)
                self._num_means += errors.size
                self._sum += float(errors.sum())
                self._largest = max(self._largest, float(errors.max()))
        self._records += len(next(iter(stored.values())))

    def figures(self) -> dict[str, float]:
        """Return the metrics. KL divergences are means over the records, in nats."""
        found: dict[str, float] = {RECORDS: self._records}
        if self._has_logits:  # rounding may leave a zero slightly below zero
            for temperature, total in self._kl.items():
                found[f"kl_t{temperature}"] = max(total / self._records, 0.0)
        if self._num_means:
            found["means_largest_error"] = self._largest
            found["means_mean_error"] = self._sum / self._num_means
        return found


def certificate_text(measured: Mapping[str, Any]) -> str:
    """Format the certificate as a line; "" if it is empty."""
    found, parts = certificate_in(measured), []
    if "kl_t1" in found and "kl_t4" in found:
        parts.append(
            f"KL divergence of the logits {found['kl_t1']:.2g} at temperature 1, "
            f"{found['kl_t4']:.2g} at 4"
        )
    if "means_largest_error" in found and "means_mean_error" in found:
        parts.append(
            f"error of the means at most {found['means_largest_error']:.2g}, "
            f"{found['means_mean_error']:.2g} on average"
        )
    for student in STUDENTS:
        changes = [(loss, found.get(f"{loss}_change_{student}")) for loss in LOSSES]
        known = [f"{loss} {100 * value:+.2g} %" for loss, value in changes if value is not None]
        if known:
            steps = f" ({found[STEPS]:,} steps)" if student == "trained" and STEPS in found else ""
            parts.append(f"losses of the {student} student{steps} {', '.join(known)}")
    if not parts:
        return ""
    records = f" on {found[RECORDS]:,} records" if RECORDS in found else ""
    return f"stored against full outputs{records}: {'; '.join(parts)}"


def _kl(full: NDArray[Any], stored: NDArray[Any], temperature: float) -> NDArray[np.float64]:
    """Return KL(softmax(full / T) || softmax(stored / T)) of each record: (R,), in nats."""
    ours, theirs = (_log_softmax(each.astype(np.float64) / temperature) for each in (full, stored))
    return np.asarray((np.exp(ours) * (ours - theirs)).sum(axis=1))


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
