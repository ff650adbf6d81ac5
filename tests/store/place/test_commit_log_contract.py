"""Both commit logs pass one suite: a folder's appended lines and a bucket's numbered objects."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from teach_once.store.errors import CacheError
from teach_once.store.format.coding import stored_arrays
from teach_once.store.format.journal import JournalWriter
from teach_once.store.format.manifest import Manifest
from teach_once.store.format.spec import Block, chunk_name
from teach_once.store.place.bucket import Bucket
from teach_once.store.place.bucket_log import BucketLog
from teach_once.store.place.commit_log import CommitLog, encode_chunks, stated_crc32c
from teach_once.store.place.folder_log import FolderLog
from teach_once.store.place.open import place_at
from tests.support.caches.object_store import Server
from tests.support.caches.random_cache import open_any, records_of
from tests.support.caches.remote_cache import url


def chunks_of(manifest: Manifest, block: Block, seed: int = 0) -> dict[str, np.ndarray]:
    records = records_of(block.view, slice(block.start, block.stop), seed)
    return dict(encode_chunks(manifest, stored_arrays(manifest.stored, block, records)))


class LogContract(ABC):
    """A cache is begun at `path`, without any block."""

    path: Path
    manifest: Manifest

    def begin(self, path: Path, spool: Path) -> None:
        with open_any(path, spool_folder=spool) as writer:
            self.path, self.manifest = path, writer.manifest

    @abstractmethod
    def log(self, rank: int = 0) -> CommitLog: ...

    @abstractmethod
    def refuse_lines(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have the disk or the store refuse lines, but no chunks."""

    def committed(self) -> set[tuple[str, int, int]]:
        return set(self.log().read().committed)

    def test_read_before_any_commit_is_empty_and_close_leaves_nothing(self) -> None:
        log = self.log()
        assert log.read().committed == {}
        log.close()
        assert list(place_at(self.path).list_files("journal")) == []

    def test_commit_makes_exactly_this_block_exist_with_its_checksums(self) -> None:
        block, log = self.manifest.block(1, 2), self.log()
        chunks = chunks_of(self.manifest, block)
        log.commit(block, chunks.items())
        found = self.log().read()
        assert found.damaged_lines == []
        assert {key: int(crc, 16) for key, crc in found.committed.items()} == {
            (array, 1, 2): stated_crc32c(data) for array, data in chunks.items()
        }
        for array, data in chunks.items():
            key = chunk_name(array, self.manifest.arrays[array], block)
            stored = place_at(self.path).read(key, data.size)
            assert stored is not None
            assert stored.content == data.tobytes()
        log.close()

    def test_commit_repeated_by_another_log_changes_nothing(self) -> None:
        block = self.manifest.block(0, 0)
        for rank in (0, 1):
            log = self.log(rank)
            log.commit(block, chunks_of(self.manifest, block).items())
            log.close()
        assert self.committed() == {(array, 0, 0) for array in self.manifest.arrays}

    def test_commits_of_two_open_logs_are_both_read(self) -> None:
        logs = [self.log(0), self.log(1)]
        for index, log in enumerate(logs):
            block = self.manifest.block(0, index)
            log.commit(block, chunks_of(self.manifest, block).items())
        assert {key[2] for key in self.committed()} == {0, 1}
        for log in logs:
            log.close()

    def test_commit_interrupted_before_its_last_chunk_leaves_no_block(self) -> None:
        block, log = self.manifest.block(0, 0), self.log()

        def interrupted() -> Iterator[tuple[str, np.ndarray]]:
            yield next(iter(chunks_of(self.manifest, block).items()))
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            log.commit(block, interrupted())
        assert self.committed() == set()
        log.commit(block, chunks_of(self.manifest, block).items())
        assert len(self.committed()) == len(self.manifest.arrays)
        log.close()

    def test_commit_whose_line_is_refused_has_stored_its_chunks_and_leaves_no_block(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        block, log = self.manifest.block(0, 0), self.log()
        with monkeypatch.context() as patch:
            self.refuse_lines(patch)
            with pytest.raises((OSError, CacheError)):
                log.commit(block, chunks_of(self.manifest, block).items())
        for array, spec in self.manifest.arrays.items():
            assert place_at(self.path).has(chunk_name(array, spec, block))
        assert self.committed() == set()
        log.close()


class TestFolderLog(LogContract):
    @pytest.fixture(autouse=True)
    def _begin(self, tmp_path: Path) -> None:
        self.begin(tmp_path / "t-e4812202", tmp_path)

    def log(self, rank: int = 0) -> FolderLog:
        return FolderLog(self.path, self.manifest, rank)

    def refuse_lines(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: object) -> None:
            raise OSError(28, "no space left")

        monkeypatch.setattr(JournalWriter, "commit", refuse)


class TestBucketLog(LogContract):
    @pytest.fixture(autouse=True)
    def _begin(self, server: Server, tmp_path: Path) -> None:
        self.server = server
        self.begin(url(), tmp_path / "spool")

    def log(self, rank: int = 0) -> BucketLog:
        return BucketLog(Bucket(url()), self.manifest)

    def refuse_lines(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            self.server,
            "spoil",
            lambda method, path, before: 403 if method == "PUT" and "/journal/" in path else None,
        )
