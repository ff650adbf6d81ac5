"""What the teacher cost: the images it saw once, and those that a teacher in the loop would see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from report.runs import Result


def ledger(results: Sequence[Result], teacher: Mapping[str, float]) -> dict[str, str]:
    """Images through the teacher, what reading them from the cache saved, and when it paid back.

    teacher: what was measured when the cache was made; without `images_per_second`, and where there
    are several teachers, the time saved is left out.
    """
    taught = [result for result in results if result.reads_cache]
    caches: dict[str, Result] = {}
    for result in results:  # a cache has the views of the run that read most of them
        known = caches.setdefault(result.cache_sha256, result)
        caches[result.cache_sha256] = max(known, result, key=lambda each: each.num_views)
    passes = sum(each.num_teachers for each in caches.values())
    cached = sum(each.num_samples * each.num_views * each.num_teachers for each in caches.values())
    live = sum(result.num_samples * result.epochs * result.num_teachers for result in taught)
    saved = sum(result.num_teachers for result in taught)
    views = " or ".join(f"{n:,}" for n in sorted({each.num_views for each in caches.values()}))
    of_each = {result.num_teachers for result in results}
    each = "one" if of_each == {1} else " or ".join(map(str, sorted(of_each)))
    more = live - cached
    entries = {
        "teacher passes run": f"{passes}, over {views} views: {cached:,} images",
        "teacher passes saved": (
            f"{saved:,} ({each} in each taught run): {live:,} images, "
            f"{abs(more):,} {'more' if more >= 0 else 'fewer'} than were run"
        ),
    }
    if passes == 1 and (rate := teacher.get("images_per_second")):
        seconds = more / rate
        net = f"{seconds:,.0f} net" if seconds >= 0 else f"none yet: {-seconds:,.0f} lost so far"
        entries["seconds saved"] = (
            f"{net}, at the {rate:,.0f} images/s measured when the "
            f"cache was made, of {sum(result.seconds for result in results):,.0f} s of training"
        )
    if taught:
        entries["paid back after"] = f"{cached / (live / len(taught)):.1f} taught runs"
    return entries
