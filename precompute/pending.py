"""Decide whether a cache is complete, without torch and, if possible, without weights."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from teach_once.configs.schema import TeacherConfig
from teach_once.nets.weights.source import check_spelling
from teach_once.precompute.compute.setup import (
    Setup,
    evaluated_images,
    evaluation_setup,
    open_evaluated,
)
from teach_once.store.errors import (
    CacheAmbiguous,
    CacheDamaged,
    CacheError,
    CacheIncomplete,
    CacheMissing,
    UnknownTap,
    UnknownView,
)
from teach_once.store.format.certificate import certificate_text
from teach_once.store.inspect.find import find_cache
from teach_once.store.place.index import write_missing_index
from teach_once.store.place.open import place_at
from teach_once.store.read.evaluation import TEST
from teach_once.store.read.reader import TeacherCache
from teach_once.store.read.source import open_source
from teach_once.views.augment.augment import pixel_canary

# Up to this size, every byte of a cache is verified before it is called complete. In a larger cache
# only the presence and size of files are checked, unless --full-check is given.
CHECKED_BYTES = 4 * 2**30
_FAR_PERCENT = 5.0  # difference from the published error that prints a warning
_CAUSES_OF_A_LARGE_ERROR = (
    "dataset.normalization differs from the teacher's training",
    "the weights' classes are in another order than the dataset's",
)
_CAUSES_OF_A_SMALL_ERROR = (
    "the expected error belongs to other weights or other test images",
    "the weights were trained on these test images",
)
_SHOWN_FAULTS = 5


def checks_every_byte(path: Path, full_check: bool) -> bool:
    """Return True if every byte of the cache at `path` is verified before it is called complete.

    Object stores have their own checksums, so caches there are read only on request.
    """
    return full_check or (place_at(path).is_local and _committed_bytes(path) <= CHECKED_BYTES)


def _committed_bytes(path: Path) -> int:
    """Return the committed bytes in the journal of the cache at `path`; 0 if there is no cache."""
    try:
        return open_source(path).coverage.num_bytes
    except CacheError:
        return 0


def if_complete(setup: Setup, full_check: bool, console: Console) -> TeacherCache | None:
    """Return the cache if it is valid and has all requested views and taps; otherwise None.

    Abandoned growth does not count as work. Prints any damage.
    """
    train, views = setup.dataset.train, setup.config.views
    try:
        cache = TeacherCache.open(setup.path, num_views=views.num_views, taps=setup.tap_names)
    except (CacheMissing, CacheIncomplete, UnknownTap, UnknownView):
        return None
    except CacheDamaged as error:
        console.print(f"{error.problem}\n  its damaged blocks will be computed again")
        return None
    cache.refuse_unless(cache.identity, labels=train.labels, canary=pixel_canary(train, views))
    if cache.manifest.measured_views < views.num_views or not setup.is_held_by(cache.taps):
        return None
    every_byte = checks_every_byte(setup.path, full_check)
    if faults := cache.source.faults(every_byte=every_byte):
        shown = "\n".join(f"  {fault}" for fault in faults[:_SHOWN_FAULTS])
        console.print(f"damaged, will be computed again:\n{shown}")
        return None
    for images in evaluated_images(setup):
        if open_evaluated(setup, images, every_byte=every_byte) is None:
            kind = "test images" if images.prefix == TEST else "probe's images"
            console.print(f"{setup.path} lacks some of the teacher's outputs of the {kind}")
            return None
    return cache


def write_missing_indexes(cache: TeacherCache, setup: Setup) -> None:
    """Write the indexes that a killed pass left out: of the cache and of its evaluation caches."""
    inside = [evaluation_setup(setup, images).path for images in evaluated_images(setup)]
    for path in (*inside, cache.path):
        write_missing_index(place_at(path))


def without_weights(setup: Setup, caches: Path) -> tuple[TeacherCache | None, str]:
    """Find the complete cache of a teacher whose weights file is missing.

    Returns the cache, or None and the reason. Raises CacheMismatch if its labels or pixels differ
    from the dataset's, CacheAmbiguous if several caches match, and ArchError if the path of the
    weights seems to be misspelled.
    """
    train, views = setup.dataset.train, setup.config.views
    try:
        cache = find_cache(
            caches,
            setup.config.name,
            setup.identity,
            num_views=views.num_views,
            taps=setup.tap_names,
        )
    except CacheAmbiguous:
        raise
    except CacheError as error:
        return None, error.problem
    check_spelling(setup.config.teacher.weights, cache.identity["teacher"]["weights_sha256"])
    cache.refuse_unless(setup.identity, labels=train.labels, canary=pixel_canary(train, views))
    if not setup.is_held_by(cache.taps):
        wanted = ", ".join(setup.tap_names)
        return None, f"{cache.path} lacks some of the taps {wanted} in the requested dtypes"
    return cache, ""


def format_measured(cache: TeacherCache, config: TeacherConfig) -> str:
    """Format the pass's measurements of the teacher, with a warning if its error is unexpected."""
    measured = cache.measured
    if not measured:
        return "The teacher's errors were not measured."
    if "test_top1_error" not in measured:
        lacks = "teacher has no logits" if cache.class_names else "images have no labels"
        return f"The {lacks}, so no error was measured.{_certificate(cache)}"
    top5 = ""
    if "test_top5_error" in measured:
        top5 = f", {measured['test_top5_error']:.2f} % top-5"
    agreement = measured.get("train_agreement")
    right = "" if agreement is None else f"; right on {100 * agreement:.2f} % of the cached views"
    return (
        f"Teacher: test error {measured['test_top1_error']:.2f} % top-1{top5}{right}."
        f"{_certificate(cache)}{_unexpected_error(config, measured['test_top1_error'])}"
    )


def _certificate(cache: TeacherCache) -> str:
    text = certificate_text(cache.measured)
    return f"\n  {text}" if text else ""


def _unexpected_error(config: TeacherConfig, measured: float) -> str:
    """Return a warning if the teacher's test error is far from the config's expected error."""
    expected = config.teacher.expected_error
    if expected is None or config.teacher.bn != "eval":
        return ""
    if abs(measured - expected) <= _FAR_PERCENT:
        return ""
    causes = _CAUSES_OF_A_LARGE_ERROR if measured > expected else _CAUSES_OF_A_SMALL_ERROR
    return (
        f"\nWARNING: {config.name} sets teacher.expected_error: {expected:.2f} %, but "
        f"{measured:.2f} % was measured. Likely causes:\n"
        + "\n".join(f"  {cause}" for cause in causes)
    )
