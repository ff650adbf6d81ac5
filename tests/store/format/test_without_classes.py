"""Caches of samples without classes have no labels, class names or `correct`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from teach_once.runtime.machine.urls import path_or_url
from teach_once.store import CacheMismatch, TapSpec, TeacherCache
from teach_once.store.command import cli
from teach_once.store.errors import CacheDamaged
from teach_once.store.format.manifest import read_manifest
from teach_once.store.inspect.picture import picture
from teach_once.store.move.convert import convert_cache
from teach_once.store.move.copy import copy_cache
from teach_once.store.move.hdf5 import export_cache, import_cache
from teach_once.store.move.trim import trim_cache
from tests.support.caches.forged_cache import forge_manifest, set_at
from tests.support.caches.object_store import Server
from tests.support.caches.random_cache import (
    CANARY,
    IDENTITY,
    LABELS,
    fill,
    open_writer,
    records_of,
)

TAPS = {"logits": TapSpec((3,), "float32"), "stage1": TapSpec((5,), "float32")}
WITHOUT = {"taps": TAPS, "labels": None, "class_names": None}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return fill(tmp_path / "t-e4812202", **WITHOUT)


def assert_whole(path: Path, num_views: int = 2) -> None:
    opened = TeacherCache.open(path)
    assert opened.faults() == []
    assert opened.num_views == num_views
    for view in range(num_views):
        found = opened.read_view(view)
        assert found.keys() == TAPS.keys()
        expected = records_of(view, slice(None))
        assert all((found[tap] == expected[tap]).all() for tap in TAPS)


def test_cache_without_classes_stores_neither_labels_nor_names(cache: Path) -> None:
    assert_whole(cache)
    content = json.loads((cache / "manifest.json").read_text())
    assert content["class_names"] is None
    assert content["whole_crc32c"].keys() == {"preview"}
    assert not (cache / "teacher.zarr" / "labels").exists()


def test_labels_and_names_of_a_cache_without_classes_are_none(cache: Path) -> None:
    opened = TeacherCache.open(cache)
    assert opened.labels is None
    assert opened.class_names is None


def test_cache_without_classes_is_compared_with_images_without_classes(cache: Path) -> None:
    opened = TeacherCache.open(cache)
    opened.refuse_unless(IDENTITY, labels=None, canary=CANARY)
    with pytest.raises(CacheMismatch, match="labels: expected"):
        opened.refuse_unless(IDENTITY, labels=LABELS, canary=CANARY)
    with pytest.raises(CacheMismatch, match="labels: expected"):
        open_writer(cache, taps=TAPS)


def test_cache_with_classes_is_refused_for_images_without(tmp_path: Path) -> None:
    path = fill(tmp_path / "t-e4812202", taps=TAPS)
    with pytest.raises(CacheMismatch, match="labels: expected not set"):
        TeacherCache.open(path).refuse_unless(IDENTITY, labels=None, canary=CANARY)
    with pytest.raises(CacheMismatch, match="labels: expected not set"):
        open_writer(path, **WITHOUT)


def test_cache_without_classes_is_copied_exported_and_trimmed(
    server: Server, cache: Path, tmp_path: Path
) -> None:
    there, _ = copy_cache(TeacherCache.open(cache), path_or_url("s3://bucket/copies"))
    back, _ = copy_cache(TeacherCache.open(there), tmp_path / "back")
    assert_whole(back)
    export_cache(back, tmp_path / "c.h5")
    assert_whole(tmp_path / "c.h5")
    made = import_cache(tmp_path / "c.h5", tmp_path / "imported")
    assert_whole(made)
    trim_cache(made, num_views=1)
    assert_whole(made, num_views=1)


def test_cache_without_classes_is_converted_with_its_logits_cut(tmp_path: Path) -> None:
    identity = {**IDENTITY, "taps": {"logits": "float32", "channel_means": "float32"}}
    cache = fill(tmp_path / "c", **WITHOUT, identity=identity)
    made = convert_cache(cache, tmp_path / "cut", logits="top:2")
    assert made.faults() == []
    largest = np.sort(made.read_view(0)["logits"], axis=1)[:, 1:]
    expected = np.sort(records_of(0, slice(None))["logits"], axis=1)[:, 1:]
    assert (largest == expected).all()
    assert made.manifest.class_names is None
    classes = np.empty((4, 2), np.uint16)
    made.source.read("logits.class", made.manifest.block(0, 0), classes)
    assert classes.max() < made.manifest.num_classes == 3


def test_cache_without_classes_survives_the_loss_of_its_manifest(cache: Path) -> None:
    before = read_manifest(cache)
    (cache / "manifest.json").unlink()
    with open_writer(cache, **{**WITHOUT, "num_views": 1}) as writer:
        assert writer.work == []
    assert read_manifest(cache) == before
    assert_whole(cache)


def test_cache_without_classes_is_listed_described_and_drawn(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["info", str(cache), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["classes"] is None
    assert cli(["check", str(cache)]) == 0
    assert picture(TeacherCache.open(cache)).startswith(b"\x89PNG")


def test_correct_without_classes_is_refused(tmp_path: Path) -> None:
    path = fill(tmp_path / "t-e4812202")
    forge_manifest(path, set_at("class_names", to=None))
    with pytest.raises(CacheDamaged, match=r"taps\.correct: expected no such tap"):
        TeacherCache.open(path)
