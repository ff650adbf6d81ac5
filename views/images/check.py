"""Find every image that cannot be used, before a pass stops at the first one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from teach_once.runtime.safe.text import one_line
from teach_once.views.images.decode import (
    decode_picture,
    has_more_pages,
    read_picture,
    shown_path,
)
from teach_once.views.images.encoded import EncodedSplit
from teach_once.views.images.forked import run_forked
from teach_once.views.splits import DatasetError, Split, count_copies, sample_digest, stack_digests

_FILES_AT_ONCE = 16


@dataclass
class ImageCheck:
    """Result of a check: number of images, a line per faulty image, number of multi-page images.

    digests: of the bytes of each image that is not faulty.
    """

    checked: int = 0
    faults: list[str] = field(default_factory=list)
    of_several_pages: int = 0
    digests: list[bytes] = field(default_factory=list)


def check_split(
    split: Split | EncodedSplit, max_pixels: int, num_workers: int, advance: Callable[[int], None]
) -> ImageCheck:
    """Decode every image of a split.

    num_workers: processes; 0: this process. advance: called with the number of images just checked.
    """
    look = _looker(split, max_pixels)
    report, total = ImageCheck(), len(split)

    def work(start: int) -> list[str | tuple[bytes, bool]]:
        return [_outcome(look, i) for i in range(start, min(start + _FILES_AT_ONCE, total))]

    for outcomes in run_forked(work, range(0, total, _FILES_AT_ONCE), num_workers):
        report.checked += len(outcomes)
        report.faults += [each for each in outcomes if isinstance(each, str)]
        good = [each for each in outcomes if not isinstance(each, str)]
        report.digests += [digest for digest, _ in good]
        report.of_several_pages += sum(has_more for _, has_more in good)
        advance(len(outcomes))
    return report


def summarize(reports: Mapping[str, ImageCheck]) -> str:
    """Return a line about all splits."""
    parts = [f"{report.checked:,} {name} images" for name, report in reports.items()]
    line = f"checked {' and '.join(parts)}"
    if pages := sum(report.of_several_pages for report in reports.values()):
        line += f"; {pages:,} have several pages, of which the first is used"
    digests = stack_digests(digest for report in reports.values() for digest in report.digests)
    if copies := count_copies(digests):
        line += f"; {copies:,} are exact copies of other images"
    return line


Look = Callable[[int], tuple[bytes, bool]]


def _looker(split: Split | EncodedSplit, max_pixels: int) -> Look:
    """Return a function that decodes a sample.

    It returns the digest, and True if its file has several pages.
    """
    if isinstance(split, EncodedSplit):

        def look(sample: int) -> tuple[bytes, bool]:
            content = split.read(sample)
            decode_picture(content, split.name_of(sample), max_pixels)
            return sample_digest(content), has_more_pages(content)

        return look
    if (paths := split.paths) is not None:

        def look_at_file(sample: int) -> tuple[bytes, bool]:
            content = read_picture(paths[sample])
            decode_picture(content, shown_path(paths[sample]), max_pixels)
            return sample_digest(content), has_more_pages(content)

        return look_at_file
    read = split.open_each or split.read_each

    def look_at_sample(sample: int) -> tuple[bytes, bool]:
        _, digest = next(iter(read(np.array([sample]))))
        return digest, False

    return look_at_sample


def _outcome(look: Look, sample: int) -> str | tuple[bytes, bool]:
    try:
        return look(sample)
    except DatasetError as error:
        return one_line(error.problem, longest=2000)
