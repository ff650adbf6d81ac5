"""Looks at the first bytes of all image files, so that a pass does not end at a bad one."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from runtime.program import program_text
from views.pictures import check_header
from views.splits import DatasetError

_AT_ONCE = 1024
_MOST_LISTED = 20
_READERS = 16


def check_headers(paths: Iterable[Path], max_pixels: int) -> None:
    """Raise DatasetError with all files that do not begin like images."""
    faults: list[str] = []
    with ThreadPoolExecutor(_READERS) as pool:
        waiting: list[Path] = []
        for path in paths:
            waiting.append(path)
            if len(waiting) == _AT_ONCE:
                faults += filter(None, pool.map(lambda each: _fault(each, max_pixels), waiting))
                waiting = []
        faults += filter(None, pool.map(lambda each: _fault(each, max_pixels), waiting))
    if faults:
        more = len(faults) - _MOST_LISTED
        listed = "\n  ".join(faults[:_MOST_LISTED] + ([f"... {more:,} more"] if more > 0 else []))
        count = "an image" if len(faults) == 1 else f"{len(faults):,} images"
        raise DatasetError(
            f"{count} cannot be read:\n  {listed}",
            fix=f"replace or remove them; {program_text('views')} check NAME decodes every image",
        )


def _fault(path: Path, max_pixels: int) -> str | None:
    try:
        check_header(path, max_pixels)
    except DatasetError as error:
        return error.problem
    return None
