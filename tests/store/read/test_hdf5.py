"""The single-file form: exported, read and imported bit for bit; damage and forgery rejected."""

from __future__ import annotations

import json
from pathlib import Path

import google_crc32c
import h5py
import numpy as np
import pytest

from teach_once.store import CacheDamaged, CacheError, CacheMissing, TeacherCache
from teach_once.store.command import cli
from teach_once.store.move.hdf5 import export_cache, import_cache
from tests.support.caches.random_cache import LABELS, fill, records_of


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return fill(tmp_path / "caches" / "t-e4812202")


@pytest.fixture
def exported(cache: Path, tmp_path: Path) -> Path:
    export_cache(cache, tmp_path / "cache.h5")
    return tmp_path / "cache.h5"


def test_plain_h5py_reads_it_by_the_description_in_format_md(exported: Path) -> None:
    with h5py.File(exported) as file:
        assert file.attrs["format"] == "teach-once-cache"
        manifest = json.loads(file["manifest"][()])
        assert manifest["num_views"] == 2
        for tap, expected in records_of(1, slice(None)).items():
            data = file[tap]
            assert data.chunks is None  # contiguous
            assert data.compression is None
            crcs = data.attrs["block_crc32c"]
            view, crcs = (data[:], crcs) if tap == "sample_digest" else (data[1], crcs[1])
            assert (view == expected).all()
            assert crcs.reshape(-1)[2] == google_crc32c.value(view[8:11].tobytes())
        assert (file["labels"][:] == LABELS).all()


def test_a_round_trip_gives_the_same_folder_bit_for_bit(
    cache: Path, exported: Path, tmp_path: Path
) -> None:
    target = import_cache(exported, tmp_path / "imported")
    ours = {f.relative_to(cache): f for f in cache.rglob("*") if f.is_file()}
    theirs = {f.relative_to(target): f for f in target.rglob("*") if f.is_file()}
    # An import has ended, and so lists its files; the pass that wrote these blocks has not.
    assert ours.keys() == theirs.keys() - {Path("index.json")}
    for name, file in ours.items():
        if name.name != "writer.lock":
            assert file.read_bytes() == theirs[name].read_bytes(), name


def test_every_flipped_byte_of_the_data_is_found(exported: Path) -> None:
    with h5py.File(exported) as file:
        offset = file["stage1"].id.get_offset()
        size = file["stage1"].id.get_storage_size()
    whole = exported.read_bytes()
    for position in range(offset, offset + size, 13):
        damage(exported, whole, position)
        with pytest.raises(CacheDamaged, match=r"tap stage1, view [01], block \d, wrong checksum"):
            read_all(exported)


def test_no_flipped_byte_anywhere_gives_other_values(cache: Path, exported: Path) -> None:
    whole = exported.read_bytes()
    right = [TeacherCache.open(cache).read_view(view) for view in range(2)]
    found = 0
    for position in range(0, len(whole), 61):
        damage(exported, whole, position)
        try:
            values = read_all(exported)
        except CacheError:
            found += 1
            continue
        for view, expected in enumerate(right):
            for tap in expected:
                assert (values[view][tap] == expected[tap]).all(), position
    assert found > 10


def damage(file: Path, whole: bytes, position: int) -> None:
    data = bytearray(whole)
    data[position] ^= 0x04
    file.write_bytes(data)


def read_all(path: Path) -> list[dict[str, np.ndarray]]:
    opened = TeacherCache.open(path)
    return [opened.read_view(view) for view in range(opened.num_views)]


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(exported: Path, kept: float) -> None:
    whole = exported.read_bytes()
    exported.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(CacheError):
        read_all(exported)


def test_an_hdf5_file_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["data"] = np.zeros(3)
    with pytest.raises(CacheMissing, match="not a teacher cache"):
        TeacherCache.open(tmp_path / "x.h5")


def test_an_unfinished_cache_is_not_exported_and_an_existing_one_not_overwritten(
    tmp_path: Path, exported: Path
) -> None:
    fill(tmp_path / "half", blocks=2)
    with pytest.raises(CacheError, match="is not finished"):
        export_cache(tmp_path / "half", tmp_path / "half.h5")
    assert not (tmp_path / "half.h5").exists()
    import_cache(exported, tmp_path / "imported")
    with pytest.raises(CacheError, match="exists"):
        import_cache(exported, tmp_path / "imported")


def test_the_commands(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["export", str(cache), str(tmp_path / "a.h5")]) == 0
    assert cli(["import", str(tmp_path / "a.h5"), str(tmp_path / "b")]) == 0
    assert cli(["check", str(tmp_path / "a.h5")]) == 0
    assert "is valid" in capsys.readouterr().out
    assert cli(["export", str(cache), str(tmp_path / "nowhere" / "a.h5")]) == 2
    assert "mkdir -p" in capsys.readouterr().err
