"""Refuses a cache that lacks some of what is asked for, with the command that finishes it."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from pathlib import Path

from runtime.program import program_text
from store.errors import CacheIncomplete, RemoteFix, TeacherPass, UnknownTap
from store.faults import Fault, damage_error
from store.layout import TapSpec, kind_of, optional_taps, tap_of
from store.source import Source


def planned_taps(taps: Collection[str], source: Source) -> list[str]:
    """Return these taps, in order. Raises UnknownTap if the cache does not plan one of them."""
    for name in taps:
        if name not in source.manifest.taps:
            known = ", ".join(source.manifest.taps)
            raise UnknownTap(f"no tap {name!r}: {source.path} holds {known}")
    return list(taps)


def refuse_incomplete(source: Source, num_views: int, taps: Collection[str]) -> None:
    """Raise CacheIncomplete where the first `num_views` views lack some of `taps`.

    Raises CacheDamaged where a line of the journal cannot be read, because that may be the reason.
    """
    lacks = source.coverage.lacking_any(taps, num_views)
    if not lacks.any():
        return
    manifest = source.manifest
    if source.unreadable_lines:
        line = source.unreadable_lines[0]
        raise damage_error(source.fix, [Fault(f"journal damaged, {line}", source.path)])
    done = lacks.size - int(lacks.sum())
    view, index = divmod(int(lacks.argmax()), lacks.shape[1])
    array = next(
        array
        for array, there in source.coverage.there.items()
        if tap_of(array) in taps and not there[view, index]
    )
    lacking, optional = _first_views(source, num_views), optional_taps(manifest.taps)
    whole_views = _whole_views(lacking, optional, num_views)
    problem = (
        f"{source.path} is not finished: {done:,} of {lacks.size:,} blocks are committed; the "
        f"first missing one: tap {array}, view {view}, block {index}"
    )
    is_folder = isinstance(source.fix, TeacherPass) and not isinstance(source.fix, RemoteFix)
    if whole_views and is_folder:
        command = _trim_command(source, num_views, lacking, optional)
        problem += f"\n  to keep only what is complete: {command}"
    opt_in = {tap: manifest.taps[tap] for tap in lacking if tap in optional}
    asked = (f"views.count={num_views}", *_settings_of(opt_in)) if whole_views else ()
    caches = source.fix.caches if isinstance(source.fix, TeacherPass) else Path("caches")
    raise CacheIncomplete(problem, fix=TeacherPass(manifest.teacher, asked, caches=caches))


def _first_views(source: Source, num_views: int) -> dict[str, int]:
    """Tap -> the first of `num_views` views that lacks some of it."""
    taps = source.coverage.incomplete_taps(num_views)
    found = ((tap, source.coverage.first_lacking_view(tap, num_views)) for tap in taps)
    ordered = {tap: view for tap, view in found if view is not None}
    return {tap: ordered[tap] for tap in source.manifest.stored if tap in ordered}


def _whole_views(lacking: Mapping[str, int], optional: Collection[str], num_views: int) -> int:
    """How many views have all required taps."""
    return min((view for tap, view in lacking.items() if tap not in optional), default=num_views)


def _trim_command(
    source: Source, num_views: int, lacking: Mapping[str, int], optional: Collection[str]
) -> str:
    """What drops the views and taps that a growth began and did not finish."""
    whole_views = _whole_views(lacking, optional, num_views)
    dropped = ",".join(
        tap for tap, view in lacking.items() if tap in optional and view < whole_views
    )
    words = [program_text("store"), "trim", shlex.quote(str(source.path))]
    words += [f"--views {whole_views}"] if whole_views < num_views else []
    words += [f"--drop-taps {dropped}"] if dropped else []
    return " ".join(words)


def _settings_of(opt_in: Mapping[str, TapSpec]) -> list[str]:
    """The keys of the teacher's file that ask for these taps."""
    others = {f"taps.{kind_of(tap)}={spec.dtype}" for tap, spec in opt_in.items() if tap != "hint"}
    hint = opt_in.get("hint")
    return [
        *sorted(others),
        *([f"taps.hint.stage={hint.stage}", f"taps.hint.dtype={hint.dtype}"] if hint else []),
    ]
