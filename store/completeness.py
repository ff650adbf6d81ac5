"""Refuses a cache that lacks some of what is asked for, with the command that finishes it."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from store.errors import CacheIncomplete, TeacherPass
from store.faults import Fault, damage_error
from store.layout import Block, TapSpec, is_opt_in, tap_of
from store.source import Source

Missing = Sequence[tuple[str, Block]]  # array, block; in the order of the blocks


def refuse_incomplete(
    source: Source, num_views: int, taps: Collection[str], missing: Missing
) -> None:
    """Raise CacheIncomplete where one of `taps` is among `missing`.

    missing: what the first `num_views` views lack. Raises CacheDamaged where a line of the journal
    cannot be read, because that may be the reason.
    """
    wanted = [(array, block) for array, block in missing if tap_of(array) in taps]
    if not wanted:
        return
    manifest = source.manifest
    if source.unreadable_lines:
        raise damage_error(
            manifest.teacher, [Fault("journal damaged", Path(source.unreadable_lines[0]))]
        )
    array, block = wanted[0]
    total = num_views * manifest.blocks_per_view
    done = total - len({(block.view, block.index) for _, block in wanted})
    whole_views, opt_in = _whole_part(source, num_views, missing)
    problem = (
        f"{source.path} is not finished: {done:,} of {total:,} blocks are committed; the first "
        f"missing one: tap {array}, view {block.view}, block {block.index}"
    )
    if whole_views:
        problem += f"\n  to keep only what is complete: {_trim_command(source, num_views, missing)}"
    asked = (f"views.count={num_views}", *_settings_of(opt_in)) if whole_views else ()
    raise CacheIncomplete(problem, fix=TeacherPass(manifest.teacher, asked))


def _whole_part(source: Source, num_views: int, missing: Missing) -> tuple[int, dict[str, TapSpec]]:
    """How many views have all required taps; and the opt-in taps that some view lacks."""
    lacking = _first_views(missing)
    whole_views = min(
        (view for tap, view in lacking.items() if not is_opt_in(tap)), default=num_views
    )
    return whole_views, {tap: source.manifest.taps[tap] for tap in lacking if is_opt_in(tap)}


def _first_views(missing: Missing) -> dict[str, int]:
    """Tap -> the first view that lacks some of it."""
    first: dict[str, int] = {}
    for array, block in missing:
        first.setdefault(tap_of(array), block.view)
    return first


def _trim_command(source: Source, num_views: int, missing: Missing) -> str:
    """What drops the views and taps that a growth began and did not finish."""
    whole_views, opt_in = _whole_part(source, num_views, missing)
    lacking = _first_views(missing)
    dropped = ",".join(tap for tap in opt_in if lacking[tap] < whole_views)
    words = ["python -m store trim", shlex.quote(str(source.path))]
    words += [f"--views {whole_views}"] if whole_views < num_views else []
    words += [f"--drop-taps {dropped}"] if dropped else []
    return " ".join(words)


def _settings_of(opt_in: Mapping[str, TapSpec]) -> list[str]:
    """The keys of the teacher's file that ask for these taps."""
    energy = {f"taps.energy={spec.dtype}" for tap, spec in opt_in.items() if tap != "hint"}
    hint = opt_in.get("hint")
    return [
        *energy,
        *([f"taps.hint.stage={hint.stage}", f"taps.hint.dtype={hint.dtype}"] if hint else []),
    ]
