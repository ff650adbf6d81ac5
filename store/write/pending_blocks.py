"""The blocks of a cache that must still be computed, and how the ranks of a job divide them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from teach_once.runtime.safe.confined import open_inside, write_inside
from teach_once.runtime.safe.locks import Job
from teach_once.runtime.safe.safe_read import BadFile, parse_json, read_open
from teach_once.store.errors import CacheBusy
from teach_once.store.format.journal import Coverage
from teach_once.store.format.manifest import Count, Manifest, first_problem, in_short
from teach_once.store.format.spec import JOURNAL, SAMPLE_DIGEST, Block, tap_of
from teach_once.store.read.zarr_source import ZarrSource

_JOB_FILE = f"{JOURNAL}/job.json"


class _JobDocument(BaseModel):
    """pending: view, block and taps of each item. damaged: positions in `pending`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    job: str
    pending: list[Annotated[tuple[Count, Count, list[str]], Field(strict=False)]]
    damaged: list[Count]


class JobList(NamedTuple):
    """The work of a job, as found by its leader.

    damaged: items with a damaged committed chunk. Their files may have the right sizes, so only
    reading them shows whether they are repaired.
    """

    pending: list[Work]
    damaged: list[Work]


@dataclass(frozen=True)
class Work:
    """A block and its taps that must be computed."""

    block: Block
    taps: tuple[str, ...]


def bytes_of(work: Sequence[Work], manifest: Manifest) -> int:
    """Return the bytes on disk of the chunks of `work`."""
    sizes = {
        tap: sum(map(manifest.chunk_file_bytes, spec.arrays(tap).values()))
        for tap, spec in manifest.stored.items()
    }
    return sum(sizes[tap] for item in work for tap in item.taps)


def unfinished(
    manifest: Manifest, coverage: Coverage, num_views: int, taps: Collection[str]
) -> Iterator[tuple[Block, set[str]]]:
    """Yield each block that needs taps for `num_views` views of `taps`, with these taps.

    Further complete views get the new taps. A block's other missing taps are computed with it
    because the teacher runs anyway. Abandoned growth stays unfinished.
    """
    views = min(max(num_views, coverage.num_complete_views()), manifest.num_views)
    lacking = {tap: coverage.lacking(tap, views) for tap in manifest.stored}
    asked = coverage.lacking_any({*taps, SAMPLE_DIGEST}, views)
    for view, index in np.argwhere(asked).tolist():
        names = {tap for tap, lacks in lacking.items() if lacks[view, index]}
        yield manifest.block(view, index), names


def pending_work(
    source: ZarrSource, num_views: int, taps: Collection[str], *, check_every_byte: bool
) -> list[Work]:
    """Return every block with the requested taps that are not committed, or damaged."""
    manifest = source.manifest
    wanted: dict[Block, set[str]] = dict(unfinished(manifest, source.coverage, num_views, taps))
    for fault in source.faults(every_byte=check_every_byte):
        if fault.tap is not None and fault.view is not None and fault.block is not None:
            block = manifest.block(fault.view, fault.block)
            wanted.setdefault(block, set()).add(tap_of(fault.tap))
    return _listed(manifest, wanted)


def committed_work(source: ZarrSource, work: Sequence[Work]) -> list[Work]:
    """Return the items with a committed chunk, which must have been found damaged."""
    there = source.coverage.there
    return [item for item in work if any(there[a][_position(item)] for a in _arrays(source, item))]


def damaged_work(source: ZarrSource, work: Sequence[Work]) -> list[Work]:
    """Return the items with a damaged committed chunk; every byte of them is read."""
    there = source.coverage.there

    def is_damaged(item: Work) -> bool:
        committed = (a for a in _arrays(source, item) if there[a][_position(item)])
        return any(source.fault_of(array, item.block) is not None for array in committed)

    return list(filter(is_damaged, work))


def with_damaged(
    manifest: Manifest, pending: Sequence[Work], damaged: Sequence[Work]
) -> list[Work]:
    """Return the pending items, with the taps of the damaged ones."""
    wanted = {item.block: set(item.taps) for item in pending}
    for item in damaged:
        wanted.setdefault(item.block, set()).update(item.taps)
    return _listed(manifest, wanted)


def _arrays(source: ZarrSource, item: Work) -> list[str]:
    stored = source.manifest.stored
    return [array for tap in item.taps for array in stored[tap].arrays(tap)]


def _position(item: Work) -> tuple[int, int]:
    return item.block.view, item.block.index


def missing_work(
    manifest: Manifest, coverage: Coverage, num_views: int, taps: Collection[str]
) -> list[Work]:
    """Return every block with the requested taps that are not committed."""
    return _listed(manifest, dict(unfinished(manifest, coverage, num_views, taps)))


def _listed(manifest: Manifest, wanted: Mapping[Block, set[str]]) -> list[Work]:
    return [Work(block, _with_samples(manifest, wanted[block])) for block in sorted(wanted)]


def _with_samples(manifest: Manifest, taps: set[str]) -> tuple[str, ...]:
    """Return the taps in the manifest's order; all if the samples' digests must be written too.

    The other taps may have been computed from other bytes.
    """
    return tuple(tap for tap in manifest.stored if tap in taps or SAMPLE_DIGEST in taps)


def write_job_list(cache: Path, job: Job, found: JobList) -> None:
    """Write the list for the other ranks of the job, so that all divide the same one."""
    plain = [[item.block.view, item.block.index, list(item.taps)] for item in found.pending]
    damaged = set(found.damaged)
    positions = [number for number, item in enumerate(found.pending) if item in damaged]
    content = {"job": job.name, "pending": plain, "damaged": positions}
    write_inside(cache, _JOB_FILE, json.dumps(content).encode())


def read_job_list(cache: Path, job: Job, manifest: Manifest) -> JobList:
    """Read the list of the job's leader. Raises CacheBusy if it belongs to another job."""
    file = cache / _JOB_FILE
    try:
        name, found = _job_list(cache, manifest)
    except (FileNotFoundError, BadFile):
        name, found = None, JobList([], [])
    if name != job.name:
        raise CacheBusy(
            f"{file} is not the work list of this job: expected job {job.name!r}, "
            f"found {in_short(name)}",
            fix="start all processes of the job again; committed blocks are saved",
        )
    return found


def _job_list(cache: Path, manifest: Manifest) -> tuple[str, JobList]:
    """Return the list. Raises BadFile if it does not fit the cache."""
    num_blocks = manifest.num_views * manifest.blocks_per_view
    most_values = num_blocks * (5 + len(manifest.stored)) + 100
    with open_inside(cache, _JOB_FILE) as file:
        content = read_open(file, cache / _JOB_FILE, most_values * 70)
    plain = parse_json(content, cache / _JOB_FILE, max_values=2 * most_values)
    try:
        document = _JobDocument.model_validate(plain)
    except ValidationError as error:
        raise BadFile(cache / _JOB_FILE, str(first_problem(error))) from None
    for view, index, taps in document.pending:
        is_planned = view < manifest.num_views and index < manifest.blocks_per_view
        if not is_planned or not set(taps) <= manifest.stored.keys():
            raise BadFile(cache / _JOB_FILE, "names a block that the cache does not plan")
    pending = [
        Work(manifest.block(view, index), tuple(taps)) for view, index, taps in document.pending
    ]
    if any(number >= len(pending) for number in document.damaged):
        raise BadFile(cache / _JOB_FILE, "names an item that it does not have")
    return document.job, JobList(pending, [pending[number] for number in document.damaged])
