"""The taps of one or several teachers with a common numbering and weights.

Stages of the second teacher are numbered after those of the first, and so on. Means are scaled by
the square root of the teacher's weight, for teacher and student, so that a sum of squared
differences gives each teacher its weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from teach_once.nets.teacher.taps import in_order
from teach_once.store.format.spec import TapSpec


@dataclass(frozen=True)
class EnsembleTaps:
    """The taps of all teachers with a common numbering.

    specs: name -> shape. student_stage: the student's stage for each stage; scale: factor of both
    sides.
    """

    specs: Mapping[str, TapSpec]
    student_stage: Mapping[str, str]
    scale: Mapping[str, float]


def combine_taps(taps: Sequence[Mapping[str, TapSpec]], weights: Sequence[float]) -> EnsembleTaps:
    """Combine the taps of one or several teachers; taps, weights: one entry per teacher."""
    specs = {tap: spec for tap, spec in taps[0].items() if not tap.startswith("stage")}
    student_stage, scale = {}, {}
    names = number_stages([len(in_order(own, "stage")) for own in taps])
    for own, numbered, weight in zip(taps, names, weights, strict=True):
        for stage, ensemble in numbered.items():
            specs[ensemble] = own[stage]
            student_stage[ensemble], scale[ensemble] = stage, math.sqrt(weight)
    return EnsembleTaps(specs, student_stage, scale)


def number_stages(counts: Sequence[int]) -> list[dict[str, str]]:
    """Return, for each teacher, {its stage: the common name}.

    With two stages each: [{"stage1": "stage1", "stage2": "stage2"}, {"stage1": "stage3", "stage2":
    "stage4"}].
    """
    found, before = [], 0
    for count in counts:
        found.append({f"stage{n}": f"stage{before + n}" for n in range(1, count + 1)})
        before += count
    return found
