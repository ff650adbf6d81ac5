"""How far reduced records are from full ones: the certificate in a cache's manifest.

A pass compares the teacher's outputs with what it stored of them, a conversion the old cache's
records with the new ones'; losses are compared by `python -m train.certify`.
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
_PARTS = 64  # into which they are spread, at least
RECORDS, STEPS = "certified_records", "certified_steps"  # STEPS: of the trained student
TEMPERATURES = (1, 4)
LOSSES, STUDENTS = ("cd", "kd", "gkd"), ("untrained", "trained")
LOSS_CHANGES = tuple(f"{loss}_change_{student}" for student in STUDENTS for loss in LOSSES)
_INFINITE = float("inf")
RANGES = {  # of the figures that a manifest may state
    RECORDS: (1, MOST_RECORDS),
    **{f"kl_t{temperature}": (0.0, _INFINITE) for temperature in TEMPERATURES},
    "means_largest_error": (0.0, _INFINITE),
    "means_mean_error": (0.0, _INFINITE),
    **dict.fromkeys(LOSS_CHANGES, (-1.0, _INFINITE)),
    STEPS: (1, 10**12),
}
Records = Mapping[str, NDArray[Any]]  # tap -> (R, ...)


def is_reduced(spec: TapSpec) -> bool:
    """Return True if a tap is stored as codes, or cut to its largest values."""
    return spec.top is not None or spec.scale is not None


def certified_blocks(blocks: Iterable[Block]) -> list[Block]:
    """Some of these blocks, the same ones each time, in order; of each as many of its first rows.

    Many images lie in the order of their classes: those that come first would stand for few of
    them. All records, where there are no more than MOST_RECORDS.
    """
    every = list(blocks)
    num_blocks = min(len(every), max(_PARTS, math.ceil(MOST_RECORDS / every[0].rows)))
    most = MOST_RECORDS // num_blocks
    chosen = sorted(random.Random(0).sample(every, num_blocks))
    return [replace(block, stop=min(block.stop, block.start + most)) for block in chosen]


def certificate_in(measured: Mapping[str, Any]) -> dict[str, Any]:
    """The certificate's figures, in its order; {} where there is none."""
    return {key: measured[key] for key in RANGES if key in measured}


class Comparison:
    """Sums up, batch by batch, how stored records differ from full ones."""

    def __init__(self) -> None:
        self._records = 0
        self._kl = dict.fromkeys(TEMPERATURES, 0.0)
        self._has_logits = False
        self._num_means, self._sum, self._largest = 0, 0.0, 0.0

    def add(self, full: Records, stored: Records) -> None:
        """The same R records in both forms. Taps: "logits" (R, K), "stageN" (R, C), or some."""
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
        """KL divergences are means over the records, in nats."""
        found: dict[str, float] = {RECORDS: self._records}
        if self._has_logits:  # rounding may leave a zero slightly below zero
            for temperature, total in self._kl.items():
                found[f"kl_t{temperature}"] = max(total / self._records, 0.0)
        if self._num_means:
            found["means_largest_error"] = self._largest
            found["means_mean_error"] = self._sum / self._num_means
        return found


def certificate_text(measured: Mapping[str, Any]) -> str:
    """The certificate in one line; empty where there is none."""
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
    """(R,) KL(softmax(full / T) || softmax(stored / T)), in nats."""
    ours, theirs = (_log_softmax(each.astype(np.float64) / temperature) for each in (full, stored))
    return np.asarray((np.exp(ours) * (ours - theirs)).sum(axis=1))


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
