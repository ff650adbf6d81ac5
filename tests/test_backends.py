"""Each backend of a cache passes the same suite: tests/support/store_contract.py."""

from __future__ import annotations

from pathlib import Path

import h5py

from store.transfer import export_cache
from tests.support.damage import flip
from tests.support.store_contract import BLOCK_ROWS, CacheContract, write_reference


class TestFolder(CacheContract):
    """A folder of zarr chunks."""

    def write(self, folder: Path) -> Path:
        return write_reference(folder / "t-e4812202")

    def damage_block(self, path: Path, array: str, view: int, block: int) -> None:
        position = f"{block}" if array == "sample_crc32c" else f"{view}.{block}"
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
            rows_before = row if data.ndim == 1 else view * data.shape[1] + row
            row_bytes = data.id.get_storage_size() // (
                data.shape[0] if data.ndim == 1 else data.shape[0] * data.shape[1]
            )
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
