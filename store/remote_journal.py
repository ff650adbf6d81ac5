"""The journal of a cache on an object store: whole journals, and the lines of single blocks.

`journal/<number>-<rank>.jsonl` is a journal of many blocks, as in a folder.
`journal/<view>/<block>/<number>.jsonl` is one line of one block (`store.commit`). Of two lines that
name a chunk the one with the higher number counts, and at equal numbers that of a whole journal.
The newest whole journal of a complete cache names everything: then no single line is read.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from runtime.formats import counted
from runtime.reading import BadFile
from store.commit import MOST_LINES, line_key, no_number_left, read_line
from store.coverage import Coverage
from store.errors import CacheDamaged, remote_fix
from store.identity import identity_sha256
from store.journal import (
    IDENTITY_DIGITS,
    SPARE_BYTES,
    Journal,
    Line,
    enter_line,
    is_journal_file,
    journal_text,
    most_journal_bytes,
    read_journal_file,
)
from store.layout import JOURNAL
from store.manifest import Manifest
from store.objects import Objects, in_parallel

_OTHER_OBJECTS = 100_000  # zarr.json, labels, whole journals, and what others have put there
_MOST_WHOLE = 10_000  # whole journals
_MOST_REPEATED = 32  # times that they may say all there is to say, twice each
_LINES_PER_BLOCK = 100  # on average, and far more than any cache has
_LINE_KEY = re.compile(rf"{JOURNAL}/(0|[1-9]\d{{0,6}})/(0|[1-9]\d{{0,9}})/(\d{{6}})\.jsonl")


class _Key(NamedTuple):
    """Of one line."""

    number: int
    view: int
    block: int

    def __str__(self) -> str:
        return line_key(self.view, self.block, self.number)


@dataclass(frozen=True)
class RemoteJournal:
    """What is committed of a cache on a store, and the numbers of its lines.

    newest: number of the newest whole journal; 0 without one. numbers: (view, block) -> the highest
    of its lines. num_loose: lines that no whole journal repeats. These two are empty where the
    newest whole journal was enough.
    """

    committed: Journal
    newest: int = 0
    numbers: dict[tuple[int, int], int] = field(default_factory=dict)
    num_loose: int = 0

    def next_number(self, view: int, block: int) -> int:
        """Under which a line of that block is newer than all that is committed."""
        return max(self.newest, self.numbers.get((view, block), 0)) + 1


def read_remote_journal(
    objects: Objects, manifest: Manifest, *, every_line: bool = False
) -> RemoteJournal:
    """What is committed. every_line: look for lines even if the newest whole journal is complete.

    Needs a request for the names and one for the newest whole journal. Where that does not name all
    that the manifest plans, also one for each other journal, one for each thousand lines, and one
    for each line that no journal repeats. Raises CacheDamaged, ObjectsUnreachable.
    """
    sizes = _whole_sizes(objects, manifest)
    last = _whole_journals(objects, manifest, dict(list(sizes.items())[-1:]))
    if not every_line and Coverage(manifest, last.journal.there).is_complete:
        return RemoteJournal(last.journal, last.newest)
    read = _whole_journals(objects, manifest, sizes) if len(sizes) > 1 else last
    whole, newest = read.journal, read.newest
    keys = _line_keys(objects, manifest)
    loose = [key for key in keys if key.number > newest or _lacks(whole, key)]
    lines = dict(zip(loose, in_parallel(lambda k: read_line(objects, str(k)), loose), strict=True))
    journal = Journal.empty(manifest)
    _enter(objects, manifest, journal, {k: v for k, v in lines.items() if k.number <= newest})
    _overlay(journal, whole)
    _enter(objects, manifest, journal, {k: v for k, v in lines.items() if k.number > newest})
    numbers = {(key.view, key.block): key.number for key in keys}  # the highest one comes last
    return RemoteJournal(journal, newest, numbers, len(loose))


def put_whole_journal(objects: Objects, manifest: Manifest, known: RemoteJournal) -> RemoteJournal:
    """Put all that is known to be committed as one object, newer than all lines it repeats.

    Returns what is known afterwards. Another process may put the same at the same time; lines that
    are put meanwhile still count.
    """
    text = journal_text(identity_sha256(manifest.identity), manifest, known.committed.committed)
    number = max(known.newest + 1, *known.numbers.values(), 0)
    while number <= MOST_LINES:
        key = f"{JOURNAL}/{number:06d}-0000.jsonl"
        is_there = objects.put_if_absent(key, text)
        if is_there or objects.get_tagged(key, len(text)).content == text:
            return dataclasses.replace(known, newest=number, num_loose=0)
        number += 1
    raise no_number_left(objects.url / JOURNAL)


def line_numbers(keys: Iterable[str]) -> Iterator[tuple[int, int, int]]:
    """The number, view and block of each key that is one of a line."""
    for key in keys:
        if (match := _LINE_KEY.fullmatch(key)) is not None:
            view, block, number = map(int, match.groups())
            yield number, view, block


def most_objects(manifest: Manifest) -> int:
    """More than a cache ever has on a store: its chunks, its lines, and the rest."""
    blocks = manifest.num_views * manifest.blocks_per_view
    return (2 * len(manifest.arrays) + _LINES_PER_BLOCK) * blocks + _OTHER_OBJECTS


class _Whole(NamedTuple):
    """What whole journals say. newest: the highest number of one that has a line of this cache."""

    journal: Journal
    newest: int


def _whole_sizes(objects: Objects, manifest: Manifest) -> dict[str, int]:
    """The names of the whole journals, in order, with their bytes.

    Raises CacheDamaged where there is more of them than any cache has.
    """
    _, found = objects.names(JOURNAL)
    listed = {each.key.rpartition("/")[2]: each.size for each in found}
    sizes = {name: listed[name] for name in sorted(filter(is_journal_file, listed))}
    most = SPARE_BYTES + _MOST_REPEATED * (most_journal_bytes(manifest) - SPARE_BYTES)
    if (total := sum(sizes.values())) > most or len(sizes) > _MOST_WHOLE:
        raise CacheDamaged(
            f"{objects.url / JOURNAL} holds {counted(len(sizes), 'file')} of {total:,} bytes, "
            f"expected at most {_MOST_WHOLE:,} of {most:,}",
            fix=remote_fix(objects.url, manifest.teacher),
        )
    return sizes


def _whole_journals(objects: Objects, manifest: Manifest, sizes: Mapping[str, int]) -> _Whole:
    """Of these names, of which later ones win. Keeps a few of them in memory at a time.

    A file without any line of this cache does not count: else another cache's could take the last
    number, and no block would ever be committed again. sizes: as listed; of more than that, nothing
    is read.
    """
    journal, newest = Journal.empty(manifest), 0
    keys = {f"{JOURNAL}/{name}": size for name, size in sizes.items()}
    contents = in_parallel(lambda key: objects.get(key, keys[key]), list(keys))
    for key, content in zip(keys, contents, strict=True):
        file: Any = io.BytesIO(content)
        try:
            is_ours = read_journal_file(file, objects.url / key, len(content), manifest, journal)
        except BadFile as error:
            fix = remote_fix(objects.url, manifest.teacher)
            raise CacheDamaged(error.problem, fix=fix) from None
        if is_ours:
            newest = int(key.rpartition("/")[2][:6])
    return _Whole(journal, newest)


def _line_keys(objects: Objects, manifest: Manifest) -> list[_Key]:
    """Of all lines of planned blocks, in the order of their numbers. Raises CacheDamaged."""
    keys, most = list[_Key](), _LINES_PER_BLOCK * manifest.num_views * manifest.blocks_per_view
    listed = objects.listed(JOURNAL, most_objects(manifest))
    for number, view, block in line_numbers(each.key for each in listed):
        if view < manifest.num_views and block < manifest.blocks_per_view:
            keys.append(_Key(number, view, block))
        if len(keys) > most:
            raise CacheDamaged(
                f"{objects.url / JOURNAL} has more than {most:,} lines of single blocks",
                fix=remote_fix(objects.url, manifest.teacher),
            )
    return sorted(keys)


def _lacks(journal: Journal, key: _Key) -> bool:
    """Whether a journal does not name all of a block."""
    return not all(there[key.view, key.block] for there in journal.there.values())


def _enter(
    objects: Objects, manifest: Manifest, journal: Journal, lines: dict[_Key, Line | None]
) -> None:
    identity = identity_sha256(manifest.identity)[:IDENTITY_DIGITS]
    for key, line in lines.items():
        is_own = line is not None and line[:3] == (identity, key.view, key.block)
        if line is None or not is_own or not enter_line(line, manifest, journal):
            journal.damaged_lines.append(str(objects.url / str(key)))


def _overlay(journal: Journal, newer: Journal) -> None:
    """Enter all of `newer`."""
    journal.damaged_lines += newer.damaged_lines
    for array, there in newer.there.items():
        np.copyto(journal.crc32c[array], newer.crc32c[array], where=there)
        journal.there[array] |= there
