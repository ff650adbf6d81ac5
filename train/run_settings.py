"""Which settings tell runs of one student apart: for the list of runs and the rows of a report.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from store.differences import distinguishing
from store.identity import identity_sha256

# Of a run's identity, what its method and seed decide; the rest are the settings of its study.
OF_ONE_RUN = ("terms", "seed", "sources", "window", "rkd_angles", "no_weight_decay")
_OF_METHOD_IN_STUDENT = "linear_connectors"
# What the name of a run's folder says besides: `-live`, `-live-bn`.
_OF_LABEL = (*OF_ONE_RUN, "teacher_outputs", "teacher_bn")
_MOST = 6  # settings in a cell of a table

Identity = Mapping[str, Any]


def settings_key(identity: Identity) -> str:
    """Return what runs of all methods and seeds of the same study have in common."""
    return identity_sha256(without(_OF_LABEL, identity))


def method_key(identity: Identity) -> str:
    """Return what the seeds of one method have in common, whatever its study."""
    kept = {key: identity[key] for key in _OF_LABEL if key != "seed" and key in identity}
    return identity_sha256(kept)


def distinct_settings(runs: Sequence[tuple[str, Identity]]) -> list[list[str]]:
    """Return, for each (label, identity), `key=value` of the settings that tell it from others.

    A method's own settings (its terms) are compared with runs of the same label, the settings of
    a study with all runs. At most six, those of the cache last, then how many more there are.
    """
    studies = distinguishing([without(_OF_LABEL, identity) for _, identity in runs])
    methods: dict[str, list[int]] = {}
    for position, (label, _) in enumerate(runs):
        methods.setdefault(label, []).append(position)
    own: list[list[str]] = [[] for _ in runs]
    for positions in methods.values():
        found = distinguishing([_of_method(runs[position][1]) for position in positions])
        for position, settings in zip(positions, found, strict=True):
            own[position] = settings
    return [_shortened([*own[n], *studies[n]]) for n in range(len(runs))]


def without(keys: Sequence[str], identity: Identity) -> dict[str, Any]:
    """Return the identity without these keys.

    Without its terms, it has nothing left of what follows from them in the student's settings.
    """
    kept = {key: value for key, value in identity.items() if key not in keys}
    student = kept.get("student")
    if "terms" in keys and isinstance(student, Mapping):
        kept["student"] = {k: v for k, v in student.items() if k != _OF_METHOD_IN_STUDENT}
    return kept


def _of_method(identity: Identity) -> dict[str, Any]:
    return {key: identity[key] for key in _OF_LABEL if key != "seed" and key in identity}


def _shortened(settings: Sequence[str]) -> list[str]:
    """Settings of the cache, which are many where the teacher is another one, come last."""
    order = sorted(settings, key=lambda each: each.startswith(("cache.", "further_caches.")))
    more = len(order) - _MOST
    return order if more <= 1 else [*order[:_MOST], f"{more} more"]
