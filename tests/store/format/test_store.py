"""The cache on disk, written by the project and read raw, and the reverse."""

from __future__ import annotations

import json
import os
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from teach_once.store import CacheIncomplete, CacheMismatch, CacheMissing, TapSpec, TeacherCache
from teach_once.store.errors import BadTeacherOutput
from teach_once.store.format.spec import Block, default_block_rows
from teach_once.store.identity import canonical_json, identity_sha256
from tests.support.caches.forged_cache import forge_manifest, set_at
from tests.support.caches.random_cache import (
    CANARY,
    IDENTITY,
    LABELS,
    TAPS,
    chunks,
    fill,
    journal_of,
    open_writer,
    records_of,
)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return fill(tmp_path / "t-e4812202")


# ---- reading what was written


def test_zarr_and_tensorstore_read_the_same(cache: Path) -> None:
    group = zarr.open_group(cache / "teacher.zarr", mode="r")
    for tap, spec in TAPS.items():
        expected = np.stack([records_of(view, slice(None))[tap] for view in range(2)])
        assert (group[tap][:] == expected).all()
        assert group[tap].metadata.dimension_names[:2] == ("view", "sample")
        path = str(cache / "teacher.zarr" / tap)
        driver = {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}
        independent = tensorstore.open(driver, open=True, read=True).result().read().result()
        assert independent.dtype == spec.dtype
        assert (independent == expected).all()
    assert (group["labels"][:] == LABELS).all()


def test_a_chunk_file_is_padded_rows_and_four_bytes_of_crc(cache: Path) -> None:
    rows = records_of(1, slice(8, 11))["logits"]
    data = (cache / "teacher.zarr" / "logits" / "c.1.2.0").read_bytes()
    payload, trailer = data[:-4], data[-4:]
    assert len(data) == 4 * 3 * 2 + 4
    assert payload[: rows.nbytes] == rows.tobytes()
    assert np.isnan(np.frombuffer(payload[rows.nbytes :], dtype="<f2")).all()
    assert int.from_bytes(trailer, "little") == google_crc32c.value(payload)


def test_a_chunk_written_by_zarr_itself_is_the_same_file(cache: Path, tmp_path: Path) -> None:
    group = zarr.open_group(cache / "teacher.zarr", mode="r")
    copy = zarr.create_array(
        tmp_path / "copy.zarr",
        shape=(2, 11, 3),
        chunks=(1, 4, 3),
        dtype="float16",
        fill_value=np.nan,
        compressors=[zarr.codecs.Crc32cCodec()],
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},
    )
    copy[:] = group["logits"][:]
    for name in ("c.0.0.0", "c.1.2.0"):
        ours = (cache / "teacher.zarr" / "logits" / name).read_bytes()
        assert (tmp_path / "copy.zarr" / name).read_bytes() == ours


# ---- the bytes of manifest and journal


def test_the_manifest_is_pinned(cache: Path) -> None:
    content = json.loads((cache / "manifest.json").read_text())
    assert content["format"] == "teach-once-cache"
    assert content["format_version"] == 1
    assert content["identity_sha256"] == identity_sha256(IDENTITY)
    assert content["taps"]["stage1"] == {
        "shape": [5],
        "dtype": "float32",
        "scale": None,
        "stage": None,
        "top": None,
    }
    assert (content["num_samples"], content["num_views"], content["block_rows"]) == (11, 2, 4)
    stated = content.pop("manifest_crc32c")
    assert stated == f"{google_crc32c.value(canonical_json(content).encode()):08x}"


def test_a_journal_line_is_pinned(tmp_path: Path) -> None:
    taps = {"correct": TapSpec((), "uint8")}
    with open_writer(tmp_path / "c", taps=taps, num_views=1, labels=LABELS[:2]) as writer:
        writer.write_block(Block(0, 0, 0, 2), {"correct": np.array([1, 0])})
    (file,) = (tmp_path / "c" / "journal").iterdir()
    assert file.name == "000001-0000.jsonl"
    assert file.read_text() == (
        '{"block":0,"crc32c":{"correct":"9bbc96ad"},"identity":"e48122029a98241c",'
        '"line_crc32c":"f0e9488a","rows":2,"taps":["correct"],"view":0}\n'
    )


# ---- block size


@pytest.mark.parametrize(
    ("record_bytes", "num_samples", "rows"),
    [
        (2, 200, 256),
        (2, 1, 1),
        (128, 50_000, 4096),
        (8192, 10**6, 2048),
        (8193, 10**6, 1024),
        (2**25, 10, 1),
    ],
)
def test_blocks_are_powers_of_two_of_at_most_16_mib(
    record_bytes: int, num_samples: int, rows: int
) -> None:
    taps = {"a": TapSpec((record_bytes,), "uint8"), "b": TapSpec((), "uint8")}
    assert default_block_rows(taps, num_samples) == rows


@settings(max_examples=30)
@given(num_samples=st.integers(1, 40), rows=st.sampled_from([1, 2, 8, 64]))
def test_any_sample_count_and_block_size_round_trips(
    tmp_path_factory: pytest.TempPathFactory, num_samples: int, rows: int
) -> None:
    path = tmp_path_factory.mktemp("c") / "c"
    values = np.random.default_rng(num_samples).normal(size=(num_samples, 2)).astype(np.float16)
    taps = {"logits": TapSpec((2,), "float16")}
    labels = np.zeros(num_samples, dtype=np.int64)
    digests = np.zeros((num_samples, 16), np.uint8)
    content = {
        "taps": taps,
        "num_samples": num_samples,
        "labels": labels,
        "num_views": 1,
        "class_names": ["a", "b"],
    }
    with open_writer(path, **content, block_rows=rows) as writer:
        for item in reversed(writer.work):
            of = slice(item.block.start, item.block.stop)
            found = {"logits": values[of], "sample_digest": digests[of]}
            writer.write_block(item.block, found)
    assert (TeacherCache.open(path).read_view(0)["logits"] == values).all()


# ---- refusal


def test_a_folder_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CacheMissing, match="is not a cache"):
        TeacherCache.open(tmp_path)
    assert issubclass(CacheMissing, FileNotFoundError)


def test_an_unfinished_cache_is_refused_with_how_far_it_is_and_the_command(tmp_path: Path) -> None:
    fill(tmp_path / "c", blocks=4)
    with pytest.raises(CacheIncomplete) as caught:
        TeacherCache.open(tmp_path / "c")
    assert "4 of 6 blocks are committed" in str(caught.value)
    assert "tap logits, view 1, block 1" in str(caught.value)
    assert "make cache-teacher TEACHER=t" in str(caught.value)


def test_a_chunk_file_without_its_journal_line_does_not_exist(cache: Path) -> None:
    (file,) = (cache / "journal").iterdir()
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(CacheIncomplete, match="5 of 6"):
        TeacherCache.open(cache)


def test_a_truncated_last_line_counts_as_never_written(cache: Path) -> None:
    (file,) = (cache / "journal").iterdir()
    file.write_bytes(file.read_bytes()[:-10])
    assert len(journal_of(cache).committed) == 5 * 4
    assert journal_of(cache).damaged_lines == []
    with pytest.raises(CacheIncomplete):
        TeacherCache.open(cache)


def test_another_identity_is_refused_with_the_differing_field(cache: Path) -> None:
    other = {**IDENTITY, "teacher": {"arch": "resnet20", "weights_sha256": "bb"}}
    with pytest.raises(CacheMismatch, match=r"teacher\.weights_sha256: expected 'bb', found 'aa'"):
        TeacherCache.open(cache).refuse_unless(other, labels=LABELS, canary=CANARY)
    with pytest.raises(CacheMismatch, match=r"teacher\.weights_sha256"):
        open_writer(cache, identity=other)


def test_a_cache_of_another_format_version_is_refused(cache: Path) -> None:
    forge_manifest(cache, set_at("format_version", to=3))
    with pytest.raises(CacheMismatch, match="was written by another version of Teach Once"):
        TeacherCache.open(cache)


@pytest.mark.parametrize("value", [np.nan, np.inf, 70_000.0])
def test_output_that_the_dtype_cannot_hold_is_refused_with_its_place(
    tmp_path: Path, value: float
) -> None:
    records = {
        tap: values.astype(np.float32) if tap != "correct" else values
        for tap, values in records_of(1, slice(4, 8)).items()
    }
    records["logits"][2, 1] = value
    with (
        open_writer(tmp_path / "c") as writer,
        pytest.raises(BadTeacherOutput, match="logits, view 1, sample 6 does not fit float16"),
    ):
        writer.write_block(Block(1, 1, 4, 8), records)
    assert {path.parent.name for path in chunks(tmp_path / "c")} == {"labels", "preview"}


def test_records_of_the_wrong_shape_or_taps_are_refused(tmp_path: Path) -> None:
    with open_writer(tmp_path / "c") as writer:
        records = records_of(0, slice(0, 4))
        with pytest.raises(ValueError, match="has shape"):
            writer.write_block(Block(0, 2, 8, 11), records)
        records["stage2"] = records["stage1"]
        with pytest.raises(ValueError, match="are not among"):
            writer.write_block(Block(0, 0, 0, 4), records)


# ---- the order of a commit


def test_a_block_is_on_the_disk_before_the_journal_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    fsync = os.fsync

    def noted(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        flushed.append(str(path.relative_to(tmp_path / "cache")))
        fsync(handle)

    with open_writer(tmp_path / "cache") as writer:
        monkeypatch.setattr(os, "fsync", noted)
        for view, block in ((0, 0), (1, 2)):
            flushed.clear()
            rows = slice(4 * block, min(4 * block + 4, 11))
            writer.write_block(writer.manifest.block(view, block), records_of(view, rows))
            *before, last = flushed
            assert last.startswith("journal/")
            for tap in TAPS:
                (file,) = [
                    n for n, name in enumerate(before) if f"{tap}/" in name and ".tmp" in name
                ]
                folder = before[file].rsplit("/", 1)[0]
                assert folder in before[file + 1 :]  # the rename, too
        monkeypatch.undo()
