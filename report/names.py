"""Names of a report's files: a report never overwrites a report of other settings.

A page contains a mark of its settings and methods. The first report of a folder is report.html. The
names of reports of other settings, or of selected runs, contain digits of a hash.
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
_MARK_BYTES = 2**16  # first bytes of a page, which contain its mark
_DIGITS = 8

Mark = tuple[str, dict[str, str]]  # hash of the settings; {hash of a label: hash of its terms}


def suffix_for(
    folder: Path, results: Sequence[Result], finished: Sequence[Result], chosen: Sequence[str]
) -> str:
    """Return the suffix of a report's file names: "" or "-" and a hash or "all".

    finished: all finished runs of the folder. chosen: the arguments that selected the runs; empty
    if the report covers all runs of their settings.
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
    """Return True if the results differ in settings, or a method's results in terms."""
    variants = {(result.settings, result.name, result.terms) for result in results}
    names = {result.name for result in results}
    return len(variants) > len(names) or len({settings for settings, *_ in variants}) > 1


def mark_text(results: Sequence[Result]) -> str:
    """Return the `<meta>` tag that contains the settings and methods of a page."""
    settings, methods = _mark_of(results)
    pairs = "".join(f" {label}-{terms}" for label, terms in sorted(methods.items()))
    return f'<meta name="report-of" content="{settings}{pairs}">'


def _is_free(folder: Path, suffix: str, mark: Mark, finished: Sequence[Result]) -> bool:
    """Return True if the name has no page, or one of the same settings or of deleted runs."""
    theirs = _read_mark(folder / f"report{suffix}.html")
    if theirs is None or _agree(theirs, mark):
        return True
    return not any(_agree(theirs, _mark_of([result])) for result in finished)


def _agree(one: Mark, other: Mark) -> bool:
    """Return True if both have the same settings, and their common methods the same terms."""
    both = one[1].keys() & other[1].keys()
    return one[0] == other[0] and all(one[1][label] == other[1][label] for label in both)


def _mark_of(results: Sequence[Result]) -> Mark:
    settings = _digits(sorted({result.settings for result in results}))
    return settings, {_digits([result.name]): _digits([result.terms]) for result in results}


def _read_mark(page: Path) -> Mark | None:
    """Return the mark of a page; None if there is no page or it has no mark."""
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
