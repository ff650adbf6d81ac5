"""The contract of every cache backend; each passes this suite as a subclass of `CacheContract`.

A subclass writes the reference cache in its own form, and damages it without the code under test.
See tests/store/read/test_backends.py.
"""

from __future__ import annotations

import multiprocessing
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from teach_once.store import (
    CacheDamaged,
    CacheError,
    CacheMismatch,
    TapSpec,
    TeacherCache,
    UnknownTap,
    UnknownView,
)
from teach_once.store.format.coding import (
    quantize_channels,
    quantize_rows,
    restore_channels,
    restore_rows,
)
from teach_once.store.read.mapped import MappedRows
from tests.support.caches.random_cache import (
    CANARY,
    DIGESTS,
    IDENTITY,
    LABELS,
    PREVIEW,
    TAPS,
    open_any,
)

REFERENCE_TAPS = {
    **TAPS,  # a vector of float16, one of float32, and a scalar
    "stage2": TapSpec((5,), "uint8", "block"),
    "attention1": TapSpec((6,), "float32"),
    "hint": TapSpec((2, 3, 4), "float16", stage="stage2"),
}
BLOCK_ROWS, NUM_SAMPLES, NUM_VIEWS = 4, len(LABELS), 2


def reference_records(view: int) -> dict[str, np.ndarray]:
    """Return the records written for a view: tap -> (N, *tap shape)."""
    rng = np.random.default_rng([3, view])
    values = {
        tap: rng.normal(size=(NUM_SAMPLES, *spec.shape)).astype(spec.read_dtype)
        for tap, spec in REFERENCE_TAPS.items()
        if tap != "correct"
    }
    return {**values, "correct": rng.integers(0, 2, NUM_SAMPLES).astype(np.uint8)}


def expected_records(view: int) -> dict[str, np.ndarray]:
    """Return the records that are read; for a tap stored as codes, their values."""
    records = reference_records(view)
    for tap, spec in REFERENCE_TAPS.items():
        if spec.scale is not None:
            records[tap] = _through_codes(records[tap], spec.scale)
    return records


def _through_codes(values: np.ndarray, scale: str) -> np.ndarray:
    if scale == "row":
        return restore_rows(*quantize_rows(values))
    blocks = np.split(values, range(BLOCK_ROWS, NUM_SAMPLES, BLOCK_ROWS))
    return np.concatenate([restore_channels(*quantize_channels(block)) for block in blocks])


def write_reference(path: Path, **more: Any) -> Path:
    """Write the reference cache: 11 samples in blocks of 4, the last of 3; two views.

    path: a folder or a URL. more: options of `open_any`.
    """
    options = {"taps": REFERENCE_TAPS, "block_rows": BLOCK_ROWS}
    with open_any(path, **options, **more) as writer:
        for item in writer.work:
            rows = slice(item.block.start, item.block.stop)
            records = {**reference_records(item.block.view), "sample_digest": DIGESTS}
            writer.write_block(item.block, {tap: values[rows] for tap, values in records.items()})
        assert writer.left_over() == []
    return path


_WRONG, _REFUSED = 1, 3


def _status(is_same: Callable[[object], bool]) -> int:
    try:
        return 0 if is_same(None) else _WRONG
    except CacheError as error:
        return _REFUSED if "forked" in str(error) else _WRONG


class CacheContract(ABC):
    """The tests that every backend passes."""

    IS_READ_AFTER_FORK = True  # otherwise a forked process gets an error

    @abstractmethod
    def write(self, folder: Path) -> Path:
        """Write the reference cache in `folder`; returns the argument of `TeacherCache.open`."""

    @abstractmethod
    def damage_block(self, path: Path, array: str, view: int, block: int) -> None:
        """Flip a bit of the block's data."""

    @abstractmethod
    def damage_whole(self, path: Path, name: str) -> None:
        """Flip a bit of an array that is stored in one piece."""

    @abstractmethod
    def damage_metadata(self, path: Path, array: str) -> None:
        """Change the metadata of the array's shape."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return self.write(tmp_path)

    @pytest.fixture
    def cache(self, path: Path) -> TeacherCache:
        return TeacherCache.open(path)

    # ---- reading

    def test_it_holds_what_was_written(self, cache: TeacherCache, path: Path) -> None:
        assert cache.path == path
        assert (cache.num_samples, cache.num_views) == (NUM_SAMPLES, NUM_VIEWS)
        assert cache.taps == REFERENCE_TAPS
        assert cache.identity == IDENTITY
        assert (cache.labels == LABELS).all()
        assert (cache.preview == PREVIEW).all()
        assert (cache.sample_digest == DIGESTS).all()

    @pytest.mark.parametrize("view", range(NUM_VIEWS))
    def test_a_view_comes_back_bit_for_bit(self, cache: TeacherCache, view: int) -> None:
        expected = expected_records(view)
        records = cache.read_view(view)
        assert records.keys() == expected.keys()
        for tap, values in records.items():
            assert values.dtype == REFERENCE_TAPS[tap].read_dtype
            assert (values == expected[tap]).all(), tap

    def test_a_block_comes_back_also_the_short_last_one(self, cache: TeacherCache) -> None:
        for index, rows in enumerate((slice(0, 4), slice(4, 8), slice(8, 11))):
            records = cache.read_block(cache.manifest.block(1, index), ["hint", "stage2"])
            for tap, values in records.items():
                assert (values == expected_records(1)[tap][rows]).all()

    def test_rows_come_in_the_order_asked_for_with_repeats(self, cache: TeacherCache) -> None:
        ids = [10, 0, 4, 4, 7]
        records = cache.read(ids, 1, taps=["correct", "logits"])
        assert list(records) == ["correct", "logits"]
        assert (records["logits"] == expected_records(1)["logits"][ids]).all()

    @pytest.mark.parametrize("view", range(NUM_VIEWS))
    def test_mapped_rows_are_those_of_the_view(self, cache: TeacherCache, view: int) -> None:
        ids, expected = np.array([10, 0, 4, 4, 7]), expected_records(view)
        mapped = MappedRows(cache, list(cache.taps))
        mapped.verify(view)
        mapped.read(1 - view, ids)  # another view's files are mapped before
        records = mapped.read(view, ids)
        assert records.keys() == expected.keys()
        for tap, values in records.items():
            assert values.dtype == REFERENCE_TAPS[tap].read_dtype
            assert (values == expected[tap][ids]).all(), tap

    def test_the_first_views_can_be_opened_alone(self, path: Path) -> None:
        first = TeacherCache.open(path, num_views=1)
        assert (first.read_view(0)["stage1"] == expected_records(0)["stage1"]).all()
        with pytest.raises(UnknownView, match=r"no view 1: .* contains views 0 to 0"):
            first.read_view(1)

    def test_threads_and_forked_processes_read_the_same(self, cache: TeacherCache) -> None:
        expected = expected_records(1)["hint"]

        def is_same(_: object) -> bool:
            return bool((cache.read_view(1, ["hint"])["hint"] == expected).all())

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(is_same, range(16)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork beside other threads
            child = multiprocessing.get_context("fork").Process(
                target=lambda: exit(_status(is_same))
            )
            child.start()
        child.join()
        assert child.exitcode == (0 if self.IS_READ_AFTER_FORK else _REFUSED)

    # ---- missing content

    def test_unknown_views_taps_and_samples_are_refused(self, cache: TeacherCache) -> None:
        with pytest.raises(UnknownView, match=r"no view 2: .* contains views 0 to 1"):
            cache.read_view(2)
        with pytest.raises(
            UnknownTap, match=r"no tap 'attention9': .* contains logits, stage1, correct"
        ):
            cache.read_view(0, taps=["attention9"])
        for sample in (-1, NUM_SAMPLES):
            with pytest.raises(UnknownView, match=f"no sample {sample}"):
                cache.read([sample], 0)
        first = TeacherCache.open(cache.path, num_views=1)  # the other view is there, not opened
        for read in (
            lambda: first.read_view(1),
            lambda: first.read([0], 1),
            lambda: first.read_block(first.manifest.block(1, 0)),
        ):
            with pytest.raises(UnknownView, match=r"no view 1: .* contains views 0 to 0"):
                read()
        with pytest.raises(UnknownView, match=r"ARGS=views\.count=3"):
            TeacherCache.open(cache.path, num_views=3)

    def test_another_configuration_is_refused_with_the_differing_fields(
        self, cache: TeacherCache
    ) -> None:
        cache.refuse_unless(IDENTITY, labels=LABELS, canary=CANARY)
        other = {**IDENTITY, "dataset": {"digest": "e"}}
        with pytest.raises(CacheMismatch, match="belongs to another configuration") as caught:
            cache.refuse_unless(other, labels=LABELS[::-1], canary=CANARY)
        assert [each.field for each in caught.value.differences] == ["dataset.digest", "labels"]
        with pytest.raises(CacheMismatch, match="the views replayed from this dataset differ"):
            cache.refuse_unless(IDENTITY, labels=LABELS, canary={**CANARY, "sha256": "x"})

    # ---- damage

    def test_a_sound_cache_has_no_faults_and_lacks_nothing(self, cache: TeacherCache) -> None:
        checked: list[int] = []
        assert cache.faults(on_chunk=checked.append) == []
        assert len(checked) == len(cache.manifest.arrays) * NUM_VIEWS * 3
        assert sum(checked) >= cache.nbytes
        assert cache.source.faults(every_byte=False) == []
        assert cache.source.metadata_faults(cache.taps) == []
        assert list(cache.source.unreadable_lines) == []
        assert cache.source.coverage.is_complete
        assert cache.source.coverage.num_missing() == 0

    @pytest.mark.parametrize("array", ["logits", "stage2", "stage2.scale", "hint"])
    def test_a_damaged_block_is_named_and_no_other_is_lost(self, path: Path, array: str) -> None:
        tap = array.removesuffix(".scale")
        self.damage_block(path, array, 1, 1)
        cache = TeacherCache.open(path)
        (fault,) = cache.faults()
        assert (fault.tap, fault.view, fault.block) == (array, 1, 1)
        with pytest.raises(CacheDamaged, match=f"tap {array}, view 1, block 1, wrong checksum"):
            cache.read_view(1, [tap])
        with pytest.raises(CacheDamaged, match=f"tap {array}, view 1, block 1, wrong checksum"):
            MappedRows(cache, [tap]).verify(1)
        MappedRows(cache, [tap]).verify(0)
        assert (cache.read_view(0)[tap] == expected_records(0)[tap]).all()
        assert (cache.read([0, 10], 1)[tap] == expected_records(1)[tap][[0, 10]]).all()
        assert TeacherCache.open(path, num_views=1).faults() == []

    def test_a_damaged_sample_checksum_is_found(self, path: Path) -> None:
        self.damage_block(path, "sample_digest", 0, 2)
        cache = TeacherCache.open(path)
        with pytest.raises(CacheDamaged, match="tap sample_digest, view 0, block 2"):
            _ = cache.sample_digest
        assert {fault.tap for fault in cache.faults()} == {"sample_digest"}

    def test_damaged_labels_and_previews_are_found(self, path: Path) -> None:
        self.damage_whole(path, "preview")
        cache = TeacherCache.open(path)
        assert [fault.what for fault in cache.faults()] == ["preview damaged"]
        with pytest.raises(CacheDamaged, match="preview damaged"):
            _ = cache.preview
        self.damage_whole(path, "labels")
        with pytest.raises(CacheDamaged, match="labels damaged"):
            TeacherCache.open(path)

    def test_damaged_metadata_are_found_without_reading_any_block(self, path: Path) -> None:
        sound = TeacherCache.open(path)
        self.damage_metadata(path, "attention1")
        with pytest.raises(CacheDamaged, match="attention1"):
            TeacherCache.open(path)
        source = sound.source
        assert source.metadata_faults([tap for tap in sound.taps if tap != "attention1"]) == []
        assert len(source.metadata_faults(["attention1"])) == 1
