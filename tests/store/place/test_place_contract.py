"""Every place passes the same suite: folders and buckets all of it, mirrors the reading part."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import BinaryIO

import numpy as np
import pytest

from teach_once.runtime.machine.urls import ObjectUrl
from teach_once.runtime.safe.safe_read import BadFile
from teach_once.store.errors import CacheBusy
from teach_once.store.format.spec import CHECKSUM_BYTES, crc_hex, with_checksum
from teach_once.store.place.bucket import Bucket
from teach_once.store.place.chunks import read_opened
from teach_once.store.place.folder import Folder
from teach_once.store.place.mirror import MirrorOfBucket
from teach_once.store.place.mirror_folder import MirrorFolder, Needs
from teach_once.store.place.place import (
    Chunk,
    ListWithoutEnd,
    Place,
    ReadablePlace,
    read_document,
)
from tests.support.caches.object_store import Server

VALUES = np.arange(12, dtype="<f4").reshape(3, 4)
DATA = with_checksum(VALUES).tobytes()
CRC = crc_hex(int.from_bytes(DATA[-CHECKSUM_BYTES:], "little"))
CHUNK = Chunk("group/array/c.0.0.0", len(DATA), CRC, 0)


def read_chunk(place: ReadablePlace, chunk: Chunk) -> tuple[np.ndarray, str | None]:
    """The values that were read, and what is wrong."""
    out = np.zeros_like(VALUES)

    def check(file: BinaryIO, found: int) -> str | None:
        return read_opened(file, found, out, chunk.num_bytes, chunk.crc32c)

    return out, place.check_chunk(chunk, check)


class ReadContract(ABC):
    """What every place offers. `put` goes round the code under test."""

    @abstractmethod
    def place(self) -> ReadablePlace: ...

    @abstractmethod
    def put(self, key: str, data: bytes) -> None: ...

    @abstractmethod
    def damage(self, key: str, data: bytes) -> None:
        """Replace a file so that no place has the right bytes."""

    def test_check_chunk_valid_gives_its_values_and_no_fault(self) -> None:
        self.put(CHUNK.key, DATA)
        values, fault = read_chunk(self.place(), CHUNK)
        assert fault is None
        assert (values == VALUES).all()

    def test_map_chunk_valid_gives_its_values(self) -> None:
        self.put(CHUNK.key, DATA)
        assert (self.place().map_chunk(CHUNK, "float32", (3, 4)) == VALUES).all()

    def test_map_chunk_truncated_raises_bad_file(self) -> None:
        self.damage(CHUNK.key, DATA[:-1])
        with pytest.raises(BadFile):
            self.place().map_chunk(CHUNK, "float32", (3, 4))

    def test_fetch_of_valid_chunks_leaves_them_readable(self) -> None:
        self.put(CHUNK.key, DATA)
        place = self.place()
        place.fetch([CHUNK, CHUNK])
        assert read_chunk(place, CHUNK)[1] is None

    def test_at_once_gives_results_in_order_and_raises_errors(self) -> None:
        place = self.place()
        for num_bytes in (0, 2**30):
            assert list(place.at_once(lambda n: n * n, range(40), num_bytes)) == [
                n * n for n in range(40)
            ]
            with pytest.raises(ZeroDivisionError):
                list(place.at_once(lambda n: 1 // n, range(4), num_bytes))


class PlaceContract(ReadContract):
    """What a place offers to writers too."""

    @abstractmethod
    def place(self) -> Place: ...

    def damage(self, key: str, data: bytes) -> None:
        self.put(key, data)

    @pytest.mark.parametrize(
        ("data", "fault"),
        [
            (None, "chunk missing"),
            (DATA[:-1], "chunk has 51 bytes, expected 52"),
            (DATA + b"x", "chunk has "),
            (b"\x01" + DATA[1:], "wrong checksum"),
            (with_checksum(VALUES + 1).tobytes(), "checksum differs from the journal's"),
        ],
    )
    def test_check_chunk_damaged_names_the_damage(self, data: bytes | None, fault: str) -> None:
        if data is not None:
            self.put(CHUNK.key, data)
        assert str(read_chunk(self.place(), CHUNK)[1]).startswith(fault)

    def test_sizes_find_missing_and_truncated_chunks_without_reading(self) -> None:
        self.put(CHUNK.key, DATA)
        self.put("group/array/c.0.1.0", DATA[:9])
        fault = self.place().sizes()
        assert fault(CHUNK) is None
        assert fault(CHUNK._replace(key="group/array/c.0.1.0")) == "chunk has 9 bytes, expected 52"
        assert fault(CHUNK._replace(key="group/array/c.0.2.0")) == "chunk missing"

    def test_read_gives_the_bytes_or_only_the_size_of_a_larger_file(self) -> None:
        place = self.place()
        assert place.read("a/b", 100) is None
        self.put("a/b", b"12345")
        found = place.read("a/b", 5)
        assert found is not None
        assert (found.content, found.size) == (b"12345", 5)
        larger = place.read("a/b", 4)
        assert larger is not None
        assert (larger.content, larger.size) == (None, 5)
        assert read_document(place, "a/b", 5) == b"12345"
        with pytest.raises(BadFile, match=r"a/b has 5 B, expected at most 4 B"):
            read_document(place, "a/b", 4)

    def test_create_of_an_existing_file_returns_false_and_changes_nothing(self) -> None:
        place = self.place()
        assert place.create("a/b", b"first")
        assert not place.create("a/b", b"second")
        assert read_document(place, "a/b", 99) == b"first"
        assert [each.key for each in place.list_files()] == ["a/b"]  # and no temporary file

    def test_create_by_several_threads_succeeds_once(self) -> None:
        place, start, made = self.place(), threading.Barrier(4), list[bytes]()

        def create(data: bytes) -> None:
            start.wait()
            if place.create("a/b", data):
                made.append(data)

        threads = [threading.Thread(target=create, args=(b"%d" % n * 1000,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [read_document(place, "a/b", 2000)] == made

    def test_replace_with_the_current_tag_replaces_and_with_an_older_one_raises(self) -> None:
        place = self.place()
        place.create("a/b", b"old")
        old = place.read("a/b", 0)
        assert old is not None
        place.replace("a/b", b"newer", old.tag)
        assert read_document(place, "a/b", 99) == b"newer"
        with pytest.raises(CacheBusy, match="a/b was changed by another process"):
            place.replace("a/b", b"newest", old.tag)
        assert read_document(place, "a/b", 99) == b"newer"
        place.replace("a/b", b"any")
        assert read_document(place, "a/b", 99) == b"any"

    def test_delete_removes_a_file_and_ignores_a_missing_one(self) -> None:
        place = self.place()
        self.put("a/b", b"x")
        place.delete("a/b")
        place.delete("a/b")
        place.delete("nothing/there")
        assert place.read("a/b", 1) is None

    def test_list_files_and_folders_give_keys_and_sizes_below_a_prefix(self) -> None:
        for key in ("top", "a/one", "a/deep/two", "ab/three"):
            self.put(key, b"xyz")
        place = self.place()
        found = {each.key: each.size for each in place.list_files("a")}
        assert found == {"a/one": 3, "a/deep/two": 3}
        assert len(list(place.list_files())) == 4
        assert sorted(place.list_folders()) == ["a", "ab"]
        assert place.list_folders("a") == ["deep"]
        assert list(place.list_files("nothing")) == place.list_folders("nothing") == []
        with pytest.raises(ListWithoutEnd):
            list(place.list_files(max_keys=3))


class TestFolder(PlaceContract):
    @pytest.fixture(autouse=True)
    def _root(self, tmp_path: Path) -> None:
        self.root = tmp_path / "place"
        self.root.mkdir()

    def place(self) -> Place:
        return Folder(self.root)

    def put(self, key: str, data: bytes) -> None:
        (self.root / key).parent.mkdir(parents=True, exist_ok=True)
        (self.root / key).write_bytes(data)

    @pytest.mark.parametrize("write", [Folder.create, Folder.replace], ids=["create", "replace"])
    def test_writing_through_a_link_raises_bad_file(
        self, write: Callable[[Folder, str, bytes], object], tmp_path: Path
    ) -> None:
        outside = tmp_path / "outside"
        outside.mkdir()
        (self.root / "a").symlink_to(outside)
        with pytest.raises(BadFile, match="is a symbolic link"):
            write(Folder(self.root), "a/b", b"x")
        assert list(outside.iterdir()) == []

    def test_delete_of_a_file_flushes_its_folder_afterwards(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.put("a/b", b"x")
        flushed: list[list[str]] = []
        monkeypatch.setattr("os.fsync", lambda handle: flushed.append(os.listdir(handle)))
        Folder(self.root).delete("a/b")
        assert flushed == [[]]

    def test_create_without_hard_links_still_keeps_an_existing_file(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*args: object, **options: object) -> None:
            raise PermissionError(1, "not permitted")

        monkeypatch.setattr("os.link", refuse)
        self.test_create_of_an_existing_file_returns_false_and_changes_nothing()


class TestBucket(PlaceContract):
    @pytest.fixture(autouse=True)
    def _server(self, server: Server) -> None:
        self.server = server

    def place(self) -> Place:
        return Bucket(ObjectUrl("s3:", "bucket", "place"))

    def put(self, key: str, data: bytes) -> None:
        self.server.ask("PUT", f"place/{key}", data)


class TestMirrorOfBucket(ReadContract):
    @pytest.fixture(autouse=True)
    def _folders(self, server: Server, tmp_path: Path) -> None:
        self.server, self.root = server, tmp_path / "mirror"

    def place(self) -> MirrorOfBucket:
        below = PurePath("bucket", "place")
        return MirrorOfBucket(
            self.root / below,
            Bucket(ObjectUrl("s3:", "bucket", "place")),
            MirrorFolder(self.root, 10**6),
            below,
            Needs(self.root),
        )

    def put(self, key: str, data: bytes) -> None:
        self.server.ask("PUT", f"place/{key}", data)

    def damage(self, key: str, data: bytes) -> None:
        self.put(key, data)

    def test_check_chunk_damaged_here_is_fetched_again(self) -> None:
        self.put(CHUNK.key, DATA)
        place = self.place()
        place.fetch([CHUNK])
        here = self.root / "bucket/place" / CHUNK.key
        here.write_bytes(b"\x01" + DATA[1:])
        assert read_chunk(place, CHUNK)[1] is None
        assert here.read_bytes() == DATA

    @pytest.mark.parametrize("data", [None, DATA[:-1], b"\x01" + DATA[1:]])
    def test_fetch_of_a_chunk_damaged_at_its_origin_keeps_nothing(self, data: bytes | None) -> None:
        if data is not None:
            self.put(CHUNK.key, data)
        for read in (lambda: self.place().fetch([CHUNK]), lambda: read_chunk(self.place(), CHUNK)):
            with pytest.raises(BadFile, match=f"s3://bucket/place/{CHUNK.key}"):
                read()
        assert not (self.root / "bucket/place" / CHUNK.key).exists()
