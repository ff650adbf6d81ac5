"""Decide which connectors end in ReLU, and measure the scale of the means that they imitate.

Both depend on the records in the cache. A stage that ends in an activation (ResNet) has no negative
means, and its connector ends in ReLU. Stages of EfficientNet, ConvNeXt, MobileNet v2 and v3, ViT
and Swin do not end in an activation: half of their means are negative, and ReLU cannot produce
them. The first committed block of view 0 decides, for runs from the cache and with a live teacher
alike, so that both train the same layers. Does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np

from teach_once.configs.schema import LossTerm, StudentConfig
from teach_once.configs.schema.losses import BUILT_IN_LOSSES
from teach_once.nets.teacher.taps import in_order
from teach_once.store.read.reader import TeacherCache
from teach_once.train.errors import TrainError
from teach_once.train.method.ensemble_taps import number_stages

_SIGNED_BELOW = -1e-6  # values between it and 0 are rounding errors
# Built-in losses that use a connector, with the connector's output. Their signatures contain this
# too, but in a file that loads torch; a test compares the two.
CONNECTED_LOSSES = {"cd": "means", "fitnets": "hint"}


class CachesOfStudy(Protocol):
    """A study's settings and the caches of its teachers."""

    @property
    def config(self) -> StudentConfig: ...
    @property
    def caches(self) -> list[TeacherCache]: ...


@dataclass(frozen=True)
class TapStatistics:
    """Statistics of one tap's records in the first committed block of view 0."""

    is_signed: bool
    mean_square: float


_KNOWN: WeakKeyDictionary[TeacherCache, dict[str, TapStatistics]] = WeakKeyDictionary()


def statistics(cache: TeacherCache, taps: Sequence[str]) -> dict[str, TapStatistics]:
    """Return the statistics of these taps; {} if no committed block has all of them."""
    known = _KNOWN.setdefault(cache, {})
    if not set(taps) <= set(known):
        for tap, values in cache.read_first_block(taps).items():
            wide = values.astype(np.float64)
            signed = bool((wide < _SIGNED_BELOW).any())
            known[tap] = TapStatistics(signed, float(np.square(wide).mean()))
    return {tap: known[tap] for tap in taps if tap in known}


def linear_connectors(study: CachesOfStudy, terms: Sequence[LossTerm]) -> tuple[str, ...]:
    """Return the taps, among those that these losses read, whose connectors end without ReLU.

    With several teachers, stages are numbered as in `train.outputs.ensemble`.
    """
    kind = study.config.student.connector
    if kind == "conv-bn-relu":
        return ()
    return tuple(tap for tap, each in _used(study, terms).items() if kind == "conv-bn" or each)


def mean_squares(study: CachesOfStudy) -> tuple[float, ...]:
    """Return the mean square of each stage's means; with several teachers, of all their stages."""
    return tuple(each.mean_square for each in _stage_statistics(study).values())


def check_ends(study: CachesOfStudy, methods: Sequence[str]) -> None:
    """Raise TrainError if a connector ends in ReLU but the teacher's means are negative."""
    net = study.config.student
    if net.connector != "conv-bn-relu" or net.relu_to_signed:
        return
    for method in methods:
        used = _used(study, study.config.methods[method])
        if signed := [tap for tap, is_signed in used.items() if is_signed]:
            raise TrainError(
                f"methods.{method}: student.connector is conv-bn-relu, whose output is never "
                f"negative, but the teacher's {', '.join(signed)} have negative values",
                fix="set student.connector=auto; or, to keep the ReLU, student.relu_to_signed=true",
            )


def format_linear(linear: Sequence[str]) -> str:
    """Return a line for the user; "" if every connector ends in ReLU."""
    if not linear:
        return ""
    return (
        f"connectors without ReLU: {', '.join(linear)}, where the teacher's outputs are negative "
        f"too"
    )


def _used(study: CachesOfStudy, terms: Sequence[LossTerm]) -> dict[str, bool]:
    """Return {tap: True if it has negative values} for taps read through a connector."""
    first = study.caches[0]  # only a single teacher has a hint: see `train.runs.check_methods`
    has_hint = "hint" in first.manifest.taps
    has_connectors = study.config.student.connector != "none"
    uses = {CONNECTED_LOSSES[term.loss] for term in terms if term.loss in CONNECTED_LOSSES}
    found: dict[str, bool] = {}
    own = [term for term in terms if term.loss not in BUILT_IN_LOSSES]
    if has_connectors and ("means" in uses or own):
        found = {stage: each.is_signed for stage, each in _stage_statistics(study).items()}
    if own and (has_hint or any(found.values())):  # otherwise it does not matter what they read
        from teach_once.train.terms import looked_at  # loads torch, and the user's code

        uses |= looked_at(own)
    if "means" not in uses:
        found = {}
    if "hint" in uses and has_hint:
        found |= {tap: each.is_signed for tap, each in statistics(first, ["hint"]).items()}
    return found


def _stage_statistics(study: CachesOfStudy) -> dict[str, TapStatistics]:
    """Return statistics by stage name, for the stages of all teachers in order."""
    of_each = [in_order(cache.manifest.taps, "stage") for cache in study.caches]
    found: dict[str, TapStatistics] = {}
    names = number_stages([len(stages) for stages in of_each])
    for cache, stages, numbered in zip(study.caches, of_each, names, strict=True):
        own: Mapping[str, TapStatistics] = statistics(cache, stages) if stages else {}
        found |= {numbered[stage]: each for stage, each in own.items()}
    return found
