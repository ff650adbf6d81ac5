"""The teachers of a study, each with a cache of the same data and views. Does not import torch.

The probabilities of several teachers are averaged. Each teacher's channel means are matched through
its own connectors (`train.outputs.ensemble`). Attention maps, hints and relations between
embeddings belong to one network, so methods that need them are rejected for several teachers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from teach_once.configs.commands import cache_command
from teach_once.configs.load import check_data_exists, load_teacher
from teach_once.configs.schema import StudentConfig, TeacherConfig
from teach_once.nets.teacher.identity import teacher_identity as nets_identity
from teach_once.nets.teacher.taps import taps_asked, teacher_stages
from teach_once.nets.weights.source import check_spelling
from teach_once.runtime.formats import counted
from teach_once.store.errors import (
    CacheError,
    CacheMismatch,
    CacheMissing,
    PassCommand,
    fixes_spelled_by,
)
from teach_once.store.identity import Identity, cache_identity, differences
from teach_once.store.inspect.find import (
    differs_in_samples_alone,
    find_cache,
    other_dataset_state,
)
from teach_once.store.read.mirror import named_as
from teach_once.store.read.reader import TeacherCache
from teach_once.train.errors import TrainError
from teach_once.views.augment.augment import pixel_canary
from teach_once.views.datasets import Dataset, load_dataset
from teach_once.views.identity import views_identity
from teach_once.views.splits import Digests, describe_change, is_other_dataset

if TYPE_CHECKING:
    from teach_once.views.pixels.batches import Pixels


def require_labels(teacher: TeacherConfig, dataset: Dataset) -> None:
    """Raise TrainError if the images have no labels, without which there is no test error."""
    if not dataset.has_labels:
        raise TrainError(
            f"the images of {teacher.name} have no labels, and networks are evaluated by their "
            f"error on labeled test images",
            fix="use images with labels; or train in your own loop with DistillationDataset, which "
            "reads the teacher's outputs",
        )


def open_cache(
    teacher: TeacherConfig,
    dataset: Dataset,
    num_views: int,
    *,
    caches_dir: Path,
    cache_path: Path | None = None,
) -> TeacherCache:
    """Return the cache of this teacher and these pixels, in `caches_dir` or at `cache_path`.

    Its taps may be incomplete. Raises CacheError, whose fix is the user's command.
    """
    identity = teacher_identity(teacher, dataset)
    with fixes_spelled_by(lambda more: pass_command(teacher, caches_dir, more)):
        if cache_path is None:
            with _explaining(dataset, lambda: other_dataset_state(caches_dir, identity)):
                cache = find_cache(caches_dir, teacher.name, identity, num_views=num_views, taps=())
            check_spelling(teacher.teacher.weights, cache.identity["teacher"]["weights_sha256"])
        else:
            cache = TeacherCache.open(cache_path, num_views=num_views, taps=())
            if differs_in_samples_alone(identity, cache.identity):
                raise _changed(dataset, cache)
        canary = pixel_canary(dataset.train, teacher.views)
        cache.refuse_unless(identity, labels=dataset.train.labels, canary=canary)
    # For errors found only when records are read. A partial, because loaders pickle caches.
    cache.spell = partial(pass_command, teacher, cache.path.parent)
    return cache


@contextmanager
def explain_too_many_views(asked: int, teacher: TeacherConfig, caches_dir: Path) -> Iterator[None]:
    """Explain a missing cache if no pass would add enough views."""
    try:
        yield
    except CacheError:
        planned = teacher.views.num_views
        if asked <= planned:
            raise
        distinct = teacher.views.augment.num_distinct_views
        is_possible = distinct is None or asked <= distinct
        most = "" if is_possible else f", and there are only {distinct} distinct views"
        raise TrainError(
            f"num_views is {asked}, but views.count of the teacher {teacher.name} gives "
            f"{counted(planned, 'view')}{most}",
            fix=pass_command(teacher, caches_dir, [f"views.count={asked}"])
            if is_possible
            else f"set num_views={distinct}",
        ) from None


def pass_command(teacher: TeacherConfig, caches_dir: Path, more: Sequence[str] = ()) -> str:
    """Return the command that builds or repairs a cache in a folder, at a URL or in a mirror."""
    return cache_command(teacher, caches_dir=named_as(caches_dir), more=more)


def tap_names(teacher: TeacherConfig) -> set[str]:
    """Return the names of the taps in a teacher's file. Raises TapError if one is invalid."""
    return {tap.name for tap in taps_asked(teacher.taps, teacher_stages(teacher))}


def verified_pixels(
    pixels: Pixels,
    dataset: Dataset,
    cache: TeacherCache,
    teacher: TeacherConfig,
    digests: Callable[[], Digests | None] | None = None,
) -> Pixels:
    """Return training pixels that reject samples whose bytes differ from the teacher's.

    digests: as in `VerifiedPixels`; default: the cache's.
    """
    from teach_once.views.pixels.resident import VerifiedPixels

    again = pass_command(teacher, cache.path.parent)
    fix = f"restore it; or, if the change is intended: rm -r {cache.path}, and {again}"
    return VerifiedPixels(pixels, dataset.train, digests or cache.sample_digest, fix)


@contextmanager
def _explaining(dataset: Dataset, other_state: Callable[[], TeacherCache | None]) -> Iterator[None]:
    """Explain a missing cache if a cache of another state of the dataset exists."""
    try:
        yield
    except (CacheMismatch, CacheMissing):
        if (cache := other_state()) is None or is_other_dataset(
            dataset.train,
            dataset.class_names,
            cache.labels,
            cache.sample_digest,
            cache.class_names,
        ):
            raise
        raise _changed(dataset, cache) from None


def _changed(dataset: Dataset, cache: TeacherCache) -> CacheMismatch:
    change = describe_change(dataset.train, cache.labels, cache.sample_digest)
    return CacheMismatch(
        f"the dataset has changed since {cache.path} was made: {change}",
        fix=PassCommand(cache.manifest.teacher, before="restore it, or: "),
    )


def teacher_identity(teacher: TeacherConfig, dataset: Dataset) -> Identity:
    """Return the identity that the teacher's cache must have; without weights, its known part."""
    return cache_identity(views_identity(teacher, dataset), nets_identity(teacher))


_MERGEABLE = {"logits", "correct", "stages"}  # outputs that several teachers can combine


@dataclass(frozen=True)
class StudyTeacher:
    """A teacher of a study. weight: of its outputs among all teachers."""

    config: TeacherConfig
    cache: TeacherCache
    weight: float = 1.0

    @property
    def stages(self) -> dict[str, str]:
        """Tapped modules by stage, {"stage1": module, ...}."""
        return teacher_stages(self.config)


def teacher_configs(config: StudentConfig, first: TeacherConfig) -> list[TeacherConfig]:
    """Return the configs of all teachers, each with the overrides of the first.

    Raises ConfigError.
    """
    overrides = first.source.overrides if first.source else ()
    others = [load_teacher(name, overrides) for name in (config.teachers or ())[1:]]
    for other in others:
        check_data_exists(other)
    return [first, *others]


def open_teachers(
    config: StudentConfig,
    first: TeacherConfig,
    dataset: Dataset,
    num_views: int,
    caches_dir: Path,
    cache_path: Path | None,
) -> tuple[StudyTeacher, ...]:
    """Open the cache of each teacher. Raises CacheError, TrainError or ConfigError.

    dataset: of the first teacher. cache_path: cache of the first teacher; None: found in
    `caches_dir`. The caches of the other teachers are in the same folder.
    """
    cache = open_cache(first, dataset, num_views, caches_dir=caches_dir, cache_path=cache_path)
    caches_dir = caches_dir if cache_path is None else cache_path.parent
    caches = [cache]
    configs = teacher_configs(config, first)
    for other in configs[1:]:
        theirs = load_dataset(other.dataset, caches_dir)
        check_same_views(first, dataset, other, theirs)
        caches.append(open_cache(other, theirs, num_views, caches_dir=caches_dir))
    return tuple(map(StudyTeacher, configs, caches, config.weight_of_each))


def check_same_views(
    first: TeacherConfig, dataset: Dataset, other: TeacherConfig, theirs: Dataset
) -> None:
    """Raise TrainError if two teachers use different images, labels or views.

    Each has its own normalization. The student has the first teacher's.
    """
    ours, found = views_identity(first, dataset), views_identity(other, theirs)
    for identity in (ours, found):
        del identity["dataset"]["normalization"]
    ours["dataset"]["classes"] = list(dataset.class_names or ())
    found["dataset"]["classes"] = list(theirs.class_names or ())
    if differing := differences(ours, found):
        lines = [f"the teachers {first.name} and {other.name} do not use the same views:"]
        raise TrainError(
            "\n  ".join([*lines, *map(str, differing)]),
            fix=f"give both files the same dataset and views, such as those of {first.name}",
        )


def check_combinable(method: str, taps: Collection[str], looked_at: Collection[str]) -> None:
    """Raise TrainError if a method needs outputs that only a single teacher has.

    taps: names, or groups of names as in losses. looked_at: parts of the student.
    """
    single = sorted({*taps} - _MERGEABLE | {*looked_at} & {"embedding", "attention", "hint"})
    if single:
        raise TrainError(
            f"methods.{method} needs {', '.join(single)}, which several teachers cannot "
            f"combine; they can combine {', '.join(sorted(_MERGEABLE))}",
            fix="use one teacher, or omit the method",
        )
