"""What is still to be computed of a cache, and how the ranks of a job share it."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.files import write_atomically
from runtime.locks import Job
from store.errors import CacheBusy
from store.folder import FolderSource
from store.layout import JOURNAL, SAMPLE_CRC, Block, is_opt_in, tap_of
from store.manifest import Manifest

_JOB_FILE = "job.json"


@dataclass(frozen=True)
class Work:
    """A block, and the taps of it that are to be computed."""

    block: Block
    taps: tuple[str, ...]


def unfinished(
    manifest: Manifest,
    has: Callable[[str, Block], bool],
    num_views: int,
    taps: Collection[str],
) -> Iterator[tuple[Block, set[str]]]:
    """Every block, and the taps of it that are to be computed for `num_views` views of `taps`.

    has: whether an array's block is committed. What is not asked for stays as complete as it is:
    further views that are complete get the new taps, and other missing taps of a block are computed
    with it because the teacher runs anyway. Growth that was given up stays unfinished.
    """
    arrays = list(manifest.arrays)
    absent = {
        block: {tap_of(array) for array in arrays if not has(array, block)}
        for block in manifest.blocks()
    }
    incomplete = (block.view for block, taps_ in absent.items() if not all(map(is_opt_in, taps_)))
    complete_views = min(incomplete, default=manifest.num_views)
    for block, lacking in absent.items():
        is_asked = block.view < max(num_views, complete_views) and not lacking.isdisjoint(
            {*taps, SAMPLE_CRC}
        )
        yield block, lacking if is_asked else set()


def pending_work(
    source: FolderSource, num_views: int, taps: Collection[str], *, check_every_byte: bool
) -> list[Work]:
    """Every block with the taps that are asked for and not committed, or not sound."""
    manifest = source.manifest
    faults = source.faults(every_byte=check_every_byte)
    unsound = {(fault.tap, fault.view, fault.block) for fault in faults}
    pending = []
    for block, missing in unfinished(manifest, source.has, num_views, taps):
        damaged = {
            tap_of(array)
            for array in manifest.arrays
            if (array, block.view, block.index) in unsound
        }
        if missing or damaged:
            names = tuple(tap for tap in manifest.stored if tap in damaged | missing)
            if SAMPLE_CRC in names:  # the other taps may stem from other bytes than these
                names = tuple(manifest.stored)
            pending.append(Work(block, names))
    return pending


def write_job_list(cache: Path, job: Job, pending: Sequence[Work]) -> None:
    """Leave the list for the other ranks of the job, so that all split the same one."""
    (cache / JOURNAL).mkdir(exist_ok=True)
    plain = [[item.block.view, item.block.index, list(item.taps)] for item in pending]
    content = {"job": job.name, "pending": plain}
    write_atomically(cache / JOURNAL / _JOB_FILE, json.dumps(content).encode())


def read_job_list(cache: Path, job: Job, manifest: Manifest) -> list[Work]:
    """The list that the job's leader left. Raises CacheBusy where it belongs to another job."""
    file = cache / JOURNAL / _JOB_FILE
    try:
        content = json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):
        content = {"job": None}
    if content["job"] != job.name:
        raise CacheBusy(
            f"{file} is not the work list of this job: expected job {job.name!r}, "
            f"found {content['job']!r}",
            fix="start all processes of the job again; committed blocks are saved",
        )
    return [
        Work(manifest.block(view, index), tuple(taps)) for view, index, taps in content["pending"]
    ]
