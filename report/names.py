"""The names of a report's files: a report never takes the place of one with other settings.

A page says which settings and methods it is of. The first report of a folder is report.html; one of
other settings has digits of them in its name, as has one of runs that were chosen by hand.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from teach_once.report.runs import Result
from teach_once.runtime.safe.safe_read import BadFile, open_regular

_MARK = re.compile(
    r'<meta name="report-of" content="([0-9a-f]{8})((?: [0-9a-f]{8}-[0-9a-f]{8})*)">'
)
_MARK_BYTES = 2**16  # of a page, within which its mark is
_DIGITS = 8

Mark = tuple[str, dict[str, str]]  # digits of the settings; {those of a label: those of its terms}


def suffix_for(
    folder: Path, results: Sequence[Result], finished: Sequence[Result], chosen: Sequence[str]
) -> str:
    """Return what the names of a report's files end with: "" or "-" and what it is of.

    finished: all finished runs of the folder. chosen: the words that chose the runs of the report,
    if they are not all of their settings.
    """
    if chosen:
        return f"-{_digits(sorted(chosen))}"
    if has_variants(results):
        return "-all"
    mark = _mark_of(results)
    settings, methods = mark
    own = _digits([settings, *(f"{label} {terms}" for label, terms in sorted(methods.items()))])
    candidates = ["", f"-{settings}", f"-{own}"]
    return next(
        (each for each in candidates if _is_free(folder, each, mark, finished)), candidates[-1]
    )


def has_variants(results: Iterable[Result]) -> bool:
    """Return True if not all have the same settings, and each method the same terms."""
    variants = {(result.settings, result.name, result.terms) for result in results}
    names = {result.name for result in results}
    return len(variants) > len(names) or len({settings for settings, *_ in variants}) > 1


def mark_text(results: Sequence[Result]) -> str:
    """Return the line of a page that says what it is of."""
    settings, methods = _mark_of(results)
    pairs = "".join(f" {label}-{terms}" for label, terms in sorted(methods.items()))
    return f'<meta name="report-of" content="{settings}{pairs}">'


def _is_free(folder: Path, suffix: str, mark: Mark, finished: Sequence[Result]) -> bool:
    """Return True if the name holds no page, or one of the same settings, or of runs now gone."""
    theirs = _read_mark(folder / f"report{suffix}.html")
    if theirs is None or _agree(theirs, mark):
        return True
    return not any(_agree(theirs, _mark_of([result])) for result in finished)


def _agree(one: Mark, other: Mark) -> bool:
    """Return True if both have the same settings, and the same terms for methods that both have."""
    both = one[1].keys() & other[1].keys()
    return one[0] == other[0] and all(one[1][label] == other[1][label] for label in both)


def _mark_of(results: Sequence[Result]) -> Mark:
    settings = _digits(sorted({result.settings for result in results}))
    return settings, {_digits([result.name]): _digits([result.terms]) for result in results}


def _read_mark(page: Path) -> Mark | None:
    """Return None if there is no page, or it has no mark."""
    try:
        with open_regular(page) as file:
            start = file.read(_MARK_BYTES).decode("utf-8", "replace")
    except (BadFile, OSError):
        return None
    if (found := _MARK.search(start)) is None:
        return None
    pairs = (pair.partition("-") for pair in found[2].split())
    return found[1], {label: terms for label, _, terms in pairs}


def _digits(words: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(words).encode("utf-8", "surrogatepass")).hexdigest()[:_DIGITS]
