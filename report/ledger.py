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
    num_views, teachers = results[0].num_views, results[0].num_teachers
    cached = results[0].num_samples * num_views * teachers
    live = sum(result.num_samples * result.epochs * teachers for result in taught)
    each = "one" if teachers == 1 else f"{teachers}"
    entries = {
        "teacher passes run": f"{teachers}, over {num_views:,} views: {cached:,} images",
        "teacher passes saved": (
            f"{len(taught) * teachers:,} ({each} in each taught run): {live:,} images, "
            f"{abs(live - cached):,} {'more' if live >= cached else 'fewer'} than were run"
        ),
    }
    if teachers == 1 and (rate := teacher.get("images_per_second")):
        seconds = (live - cached) / rate
        net = f"{seconds:,.0f} net" if seconds >= 0 else f"none yet: {-seconds:,.0f} lost so far"
        entries["seconds saved"] = (
            f"{net}, at the {rate:,.0f} images/s measured when the "
            f"cache was made, of {sum(result.seconds for result in results):,.0f} s of training"
        )
    if taught:
        entries["paid back after"] = f"{cached / (live / len(taught)):.1f} taught runs"
    return entries
