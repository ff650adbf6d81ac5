"""Commits a pass's blocks to a cache on an object store, from this machine or a cluster's node."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from runtime.urls import ObjectUrl
from store.commit import commit_block, line_key
from store.disk import is_full, refusals_of
from store.encode import stored_arrays
from store.errors import CacheFull, TeacherPass
from store.layout import CHECKSUM_BYTES, Block, encode_chunk
from store.manifest import Manifest
from store.objects import Objects, in_parallel
from store.work import Work

Position = tuple[int, int]  # view, block


@dataclass(frozen=True)
class Before:
    """What was committed before of the blocks that are to be committed.

    number: of a new line, for blocks of which there is none; numbers: for others. unsound: arrays
    whose chunks are not what a line says.
    """

    number: int = 1
    numbers: dict[Position, int] = field(default_factory=dict)
    unsound: dict[Position, tuple[str, ...]] = field(default_factory=dict)


class RemoteBlocks:
    """Commits whole blocks of the cache at `url`.

    spool_folder: of this process alone, on this machine, for records of unfinished blocks.
    """

    rank = 0  # of this process in its spool folder, which it has for itself

    def __init__(
        self, url: ObjectUrl, manifest: Manifest, spool_folder: Path, before: Before
    ) -> None:
        self.url, self.manifest, self.spool_folder = url, manifest, spool_folder
        self.before = before
        self._objects = Objects(url)
        self._shared: dict[tuple[str, int], bytes] = {}  # checksums of all views' chunks there

    def write_block(self, block: Block, records: Mapping[str, NDArray[Any]]) -> None:
        """Commit one whole block of some taps: tap -> (rows of the block, *tap shape).

        Where another writer has put a chunk, that is adopted. "sample_crc32c" counts as a tap here
        if the cache has it. Raises SamplesChanged where other views of these samples were computed
        from other bytes; BadTeacherOutput where a value is not finite or overflows the tap's dtype;
        ValueError if taps or shapes are not those of the cache; ObjectsUnreachable.
        """
        self._commit(block, stored_arrays(self.manifest.stored, block, records))

    def _commit(self, block: Block, arrays: Mapping[str, NDArray[Any]]) -> None:
        chunks, specs = {}, self.manifest.arrays
        for array, values in arrays.items():
            rows = self.manifest.chunk_rows(specs[array])
            chunks[array] = encode_chunk(values, specs[array], rows)[0].tobytes()
        shared = {
            (array, block.index): chunk[-CHECKSUM_BYTES:]
            for array, chunk in chunks.items()
            if specs[array].all_views
        }
        position = (block.view, block.index)
        commit_block(
            self._objects,
            self.manifest,
            block,
            chunks,
            number=self._number(position),
            unsound=self.before.unsound.get(position, ()),
            known=[key[0] for key in shared if self._shared.get(key) == shared[key]],
        )
        self._shared.update(shared)

    def outstanding(self, group: Sequence[Work]) -> list[Work]:
        """Those blocks that no other writer has committed meanwhile."""

        def is_there(item: Work) -> bool:
            view, index = item.block.view, item.block.index
            return self._objects.has(line_key(view, index, self._number((view, index))))

        there = in_parallel(is_there, group)
        return [item for item, is_done in zip(group, there, strict=True) if not is_done]

    def _number(self, position: Position) -> int:
        return self.before.numbers.get(position, self.before.number)

    def refuse_if_too_full(self, work: Sequence[Work]) -> None:
        """Nothing to do: an object store has room."""

    @contextmanager
    def refusing_full(self) -> Iterator[None]:
        """Raise CacheFull where this machine has no room for records of unfinished blocks."""
        try:
            with refusals_of(self.spool_folder):
                yield
        except OSError as error:
            if not is_full(error):
                raise
            raise CacheFull(
                f"the disk of {self.spool_folder} is too full for the records of unfinished "
                f"blocks; committed blocks are saved",
                fix=TeacherPass(self.manifest.teacher, before="make room, then: "),
            ) from None
