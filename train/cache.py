"""The cache of a teacher's config: found, and made sure that it belongs to these images.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from configs.commands import cache_command
from configs.schema import TeacherConfig
from nets.identity import teacher_identity as nets_identity
from nets.taps import taps_asked, teacher_stages
from nets.weights_file import refuse_misspelled
from runtime.formats import counted
from store.errors import CacheError, CacheMismatch, CacheMissing, TeacherPass, fixes_spelled_by
from store.find import differs_in_samples_alone, find_cache, other_dataset_state
from store.identity import Identity, cache_identity
from store.mirror import named_as
from store.reader import TeacherCache
from train.errors import TrainError
from views.canary import pixel_canary
from views.changes import describe_change, is_other_dataset
from views.datasets import Dataset
from views.identity import views_identity

if TYPE_CHECKING:
    from views.batches import Pixels


def open_cache(
    teacher: TeacherConfig,
    dataset: Dataset,
    num_views: int,
    *,
    caches_dir: Path,
    cache_path: Path | None = None,
) -> TeacherCache:
    """The cache of this teacher and these pixels: in `caches_dir`, or the one at `cache_path`.

    Its taps may be unfinished. Raises CacheError, whose fix is the user's own command.
    """
    identity = teacher_identity(teacher, dataset)
    with fixes_spelled_by(lambda more: pass_command(teacher, caches_dir, more)):
        if cache_path is None:
            with _explaining(dataset, lambda: other_dataset_state(caches_dir, identity)):
                cache = find_cache(caches_dir, teacher.name, identity, num_views=num_views, taps=())
            refuse_misspelled(teacher.teacher.weights, cache.identity["teacher"]["weights_sha256"])
        else:
            cache = TeacherCache.open(cache_path, num_views=num_views, taps=())
            if differs_in_samples_alone(identity, cache.identity):
                raise _changed(dataset, cache)
        canary = pixel_canary(dataset.train, teacher.views)
        cache.refuse_unless(identity, labels=dataset.train.labels, canary=canary)
    # For what is found only when records are read. A partial, since loaders pickle caches.
    cache.spell = partial(pass_command, teacher, cache.path.parent)
    return cache


@contextmanager
def refusing_too_many_views(asked: int, teacher: TeacherConfig, caches_dir: Path) -> Iterator[None]:
    """Where there is no such cache, and a pass would not make one with enough views: say so."""
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
            f"num_views is {asked}, but views.count of the teacher {teacher.name} makes a cache of "
            f"{counted(planned, 'view')}{most}",
            fix=pass_command(teacher, caches_dir, [f"views.count={asked}"])
            if is_possible
            else f"num_views={distinct}",
        ) from None


def pass_command(teacher: TeacherConfig, caches_dir: Path, more: Sequence[str] = ()) -> str:
    """What makes or mends a cache in this folder, a URL, or the folder of a mirror."""
    return cache_command(teacher, caches_dir=named_as(caches_dir), more=more)


def tap_names(teacher: TeacherConfig) -> set[str]:
    """The names of the taps that a teacher's file asks for. Raises TapError."""
    return {tap.name for tap in taps_asked(teacher.taps, teacher_stages(teacher))}


def verified_pixels(
    pixels: Pixels, dataset: Dataset, cache: TeacherCache, teacher: TeacherConfig
) -> Pixels:
    """Training pixels that refuse a sample read from other bytes than those the teacher saw."""
    from views.pixels import VerifiedPixels

    if (checksums := cache.sample_crc32c) is None:
        return pixels
    again = pass_command(teacher, cache.path.parent)
    fix = f"restore it; or, if it is right as it is: rm -r {cache.path}, and {again}"
    return VerifiedPixels(pixels, dataset.train, checksums, fix)


@contextmanager
def _explaining(dataset: Dataset, other_state: Callable[[], TeacherCache | None]) -> Iterator[None]:
    """Where there is no such cache, but one of another state of the dataset: say what changed."""
    try:
        yield
    except (CacheMismatch, CacheMissing):
        if (cache := other_state()) is None or is_other_dataset(
            dataset.train,
            dataset.class_names,
            cache.labels,
            cache.sample_crc32c,
            cache.manifest.class_names,
        ):
            raise
        raise _changed(dataset, cache) from None


def _changed(dataset: Dataset, cache: TeacherCache) -> CacheMismatch:
    change = describe_change(dataset.train, cache.labels, cache.sample_crc32c)
    return CacheMismatch(
        f"the dataset has changed since {cache.path} was made: {change}",
        fix=TeacherPass(cache.manifest.teacher, before="restore it, or: "),
    )


def teacher_identity(teacher: TeacherConfig, dataset: Dataset) -> Identity:
    """The identity that the teacher's cache must have; of missing weights, what is known."""
    return cache_identity(views_identity(teacher, dataset), nets_identity(teacher))
