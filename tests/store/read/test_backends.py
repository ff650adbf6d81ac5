"""Each backend of a cache passes the same suite: tests/support/caches/store_contract.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import pytest

from teach_once.runtime.machine.urls import path_or_url
from teach_once.store.move.hdf5 import export_cache
from tests.support.caches.damage import flip
from tests.support.caches.object_store import Server, emptied, running
from tests.support.caches.store_contract import BLOCK_ROWS, CacheContract, write_reference


class TestFolder(CacheContract):
    """A folder of zarr chunks."""

    def write(self, folder: Path) -> Path:
        return write_reference(folder / "t-e4812202")

    def damage_block(self, path: Path, array: str, view: int, block: int) -> None:
        position = f"{block}" if array == "sample_digest" else f"{view}.{block}"
        (chunk,) = (path / "teacher.zarr" / array).glob(f"c.{position}*")
        flip(chunk, 1)

    def damage_whole(self, path: Path, name: str) -> None:
        (chunk,) = (path / "teacher.zarr" / name).glob("c.*")
        flip(chunk, 1)

    def damage_metadata(self, path: Path, array: str) -> None:
        file = path / "teacher.zarr" / array / "zarr.json"
        file.write_text(file.read_text().replace("11", "12"))


class TestHdf5(CacheContract):
    """One HDF5 file, exported from a folder."""

    def write(self, folder: Path) -> Path:
        file = folder / "cache.h5"
        export_cache(write_reference(folder / "t-e4812202"), file)
        return file

    def damage_block(self, path: Path, array: str, view: int, block: int) -> None:
        with h5py.File(path) as file:
            data = file[array]
            row = block if array.endswith(".scale") else block * BLOCK_ROWS
            shared = array == "sample_digest"  # by all views
            rows_before = row if shared else view * data.shape[1] + row
            num_rows = data.shape[0] if shared else data.shape[0] * data.shape[1]
            row_bytes = data.id.get_storage_size() // num_rows
            position = data.id.get_offset() + rows_before * row_bytes
        flip(path, position)

    def damage_whole(self, path: Path, name: str) -> None:
        with h5py.File(path) as file:
            position = file[name].id.get_offset()
        flip(path, position)

    def damage_metadata(self, path: Path, array: str) -> None:
        with h5py.File(path, "r+") as file:
            values = file[array][:, :-1]
            del file[array]
            file[array] = values


class TestObjects(CacheContract):
    """Bucket of a store, put there by a writer of its own; read without a mirror."""

    IS_READ_AFTER_FORK = False
    _server: Server
    _is_written = False
    _before: dict[str, bytes]  # objects that were damaged

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def server(cls) -> Iterator[None]:
        with running() as server, emptied(server):
            cls._server, cls._is_written, cls._before = server, False, {}
            yield

    def write(self, folder: Path) -> Path:
        url = path_or_url("s3://bucket/caches/t-e4812202")
        if not type(self)._is_written:
            with emptied(self._server):
                write_reference(url, spool_folder=folder / "spool")
            type(self)._is_written = True
        while self._before:
            self._server.ask("PUT", *self._before.popitem())
        return url

    def damage_block(self, path: Path, array: str, view: int, block: int) -> None:
        position = f"{block}" if array == "sample_digest" else f"{view}.{block}"
        self._flip(f"teacher.zarr/{array}/c.{position}")

    def damage_whole(self, path: Path, name: str) -> None:
        self._flip(f"teacher.zarr/{name}/c.0")

    def damage_metadata(self, path: Path, array: str) -> None:
        key = f"caches/t-e4812202/teacher.zarr/{array}/zarr.json"
        self._replace(key, lambda text: text.replace(b"11", b"12"))

    def _flip(self, start: str) -> None:
        """Change the second byte of the object whose key begins so."""
        whole = f"caches/t-e4812202/{start}"
        (key,) = (k for k in self._server.all_keys() if k == whole or k.startswith(f"{whole}.0"))
        self._replace(key, lambda chunk: chunk[:1] + bytes([chunk[1] ^ 1]) + chunk[2:])

    def _replace(self, key: str, change: Callable[[bytes], bytes]) -> None:
        self._before[key] = self._server.ask("GET", key)
        self._server.ask("PUT", key, change(self._before[key]))
