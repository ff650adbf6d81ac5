"""The further teachers of a study: each with a cache of the same data and views. Imports no torch.

Their probabilities are averaged, their channel means matched each through connectors of its own
(`train.merged`). What would have no meaning for several is refused: attention maps, hints and
relations between embeddings are those of one network.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from configs.load import load_teacher, refuse_missing_data
from configs.schema import StudentConfig, TeacherConfig
from nets.taps import teacher_stages
from store.differences import differences
from store.reader import TeacherCache
from train.cache import open_cache
from train.errors import TrainError
from views.datasets import Dataset, load_dataset
from views.identity import views_identity

_MERGEABLE = {"logits", "correct", "stages"}  # what several teachers have together


@dataclass(frozen=True)
class FurtherTeacher:
    """A teacher of a study besides its first one."""

    config: TeacherConfig
    cache: TeacherCache
    weight: float

    @property
    def stages(self) -> dict[str, str]:
        """ "stageN" -> module."""
        return teacher_stages(self.config)


def further_configs(config: StudentConfig, first: TeacherConfig) -> list[TeacherConfig]:
    """The configs of all teachers but the first, with the first one's overrides.

    Raises ConfigError.
    """
    overrides = first.source.overrides if first.source else ()
    others = [load_teacher(name, overrides) for name in (config.teachers or ())[1:]]
    for other in others:
        refuse_missing_data(other)
    return others


def open_further(
    config: StudentConfig,
    first: TeacherConfig,
    dataset: Dataset,
    num_views: int,
    caches_dir: Path,
) -> tuple[FurtherTeacher, ...]:
    """The caches of all teachers but the first. Raises CacheError, TrainError, ConfigError.

    dataset: the first one's.
    """
    found = []
    others = further_configs(config, first)
    for other, weight in zip(others, config.weight_of_each[1:], strict=True):
        theirs = load_dataset(other.dataset, caches_dir)
        refuse_other_views(first, dataset, other, theirs)
        cache = open_cache(other, theirs, num_views, caches_dir=caches_dir)
        found.append(FurtherTeacher(other, cache, weight))
    return tuple(found)


def refuse_other_views(
    first: TeacherConfig, dataset: Dataset, other: TeacherConfig, theirs: Dataset
) -> None:
    """Raise TrainError where two teachers see other images, labels or views.

    Each has its own normalisation, as the student has the first one's.
    """
    ours, found = views_identity(first, dataset), views_identity(other, theirs)
    for identity in (ours, found):
        del identity["dataset"]["normalisation"]
    ours["dataset"]["classes"] = list(dataset.class_names)
    found["dataset"]["classes"] = list(theirs.class_names)
    if differing := differences(ours, found):
        lines = [f"the teachers {first.name} and {other.name} do not see the same views:"]
        raise TrainError(
            "\n  ".join([*lines, *map(str, differing)]),
            fix=f"give both files the same dataset and views, such as those of {first.name}",
        )


def refuse_unmergeable(method: str, taps: Collection[str], looked_at: Collection[str]) -> None:
    """Raise TrainError where a method needs what only a single teacher has.

    taps: names, or groups of names as losses give them. looked_at: parts of the student.
    """
    single = sorted({*taps} - _MERGEABLE | {*looked_at} & {"embedding", "energy", "hint"})
    if single:
        raise TrainError(
            f"methods.{method} needs {', '.join(single)}, which several teachers do not have "
            f"together; they have {', '.join(sorted(_MERGEABLE))}",
            fix="give it one teacher, or leave the method out",
        )
