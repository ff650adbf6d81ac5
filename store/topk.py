"""Logits cut to the k largest: as many classes and values, and what all the others come to.

Per record the k largest logits as (uint16 class, float16 value), largest first, and the float16
logsumexp of the others. Read back, the others all get the value that keeps their sum of
probabilities: at T = 1 the k probabilities and the rest's sum are those of the full logits, up to
rounding. Source: the "marginal smoothing" of Shen and Xing 2021, "A Fast Knowledge Distillation
Framework for Visual Recognition", here in logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

CLASS, REST = ".class", ".rest"  # suffixes of the arrays beside the values


def cut_rows(values: NDArray[np.float32], k: int) -> dict[str, NDArray[np.generic]]:
    """(R, K) float32 with K > k -> {"": (R, k) float16, ".class": (R, k) uint16, ".rest": (R,)}.

    Equal values are kept in the order of their classes.
    """
    order = np.argsort(-values, axis=1, kind="stable")
    classes, others = order[:, :k], np.take_along_axis(values, order[:, k:], axis=1)
    largest = others.max(axis=1).astype(np.float64)
    sums = np.exp(others.astype(np.float64) - largest[:, None]).sum(axis=1)
    return {
        "": np.take_along_axis(values, classes, axis=1).astype(np.float16),
        CLASS: classes.astype(np.uint16),
        REST: (largest + np.log(sums)).astype(np.float16),
    }


def expanded_rows(
    values: NDArray[np.float16],
    classes: NDArray[np.uint16],
    rest: NDArray[np.float16],
    num_classes: int,
) -> NDArray[np.float32]:
    """The inverse: (R, K) float32."""
    share = rest.astype(np.float32) - np.float32(math.log(num_classes - values.shape[1]))
    rows = np.repeat(share[:, None], num_classes, axis=1)
    np.put_along_axis(rows, classes.astype(np.int64), values.astype(np.float32), axis=1)
    return rows


def compact_names(tap: str) -> tuple[str, str, str]:
    """The arrays of a cut tap: values, classes, rest."""
    return tap, tap + CLASS, tap + REST


def expanded(
    arrays: Mapping[str, NDArray[np.generic]], tap: str, num_classes: int
) -> NDArray[np.float32]:
    """`expanded_rows` of arrays by name."""
    values, classes, rest = (arrays[name] for name in compact_names(tap))
    return expanded_rows(values, classes, rest, num_classes)  # type: ignore[arg-type]
