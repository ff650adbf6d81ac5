"""An unreadable manifest loses no committed record, for any requested pass."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from teach_once.store import CacheError, CacheMismatch, TapSpec, TeacherCache
from teach_once.store.format.manifest import read_manifest
from tests.support.caches import remote_cache
from tests.support.caches.damage import flip
from tests.support.caches.object_store import Server
from tests.support.caches.random_cache import TAPS, open_writer, records_of

FURTHER: Mapping[str, TapSpec] = {
    "embedding": TapSpec((2,), "float16"),
    "hint": TapSpec((5, 2, 2), "float16", stage="stage1"),
    "attention1": TapSpec((4,), "float32"),
}
REDUCED: Mapping[str, TapSpec] = {
    "logits": TapSpec((3,), "float16", top=2),
    "stage1": TapSpec((5,), "uint8", "block"),
    "correct": TapSpec((), "uint8"),
}


def fill_any(path: Path, taps: Mapping[str, TapSpec], **changes: Any) -> Path:
    """Write all pending blocks of these taps: those of `records_of`, and ones."""
    with open_writer(path, taps=taps, **changes) as writer:
        for item in writer.work:
            rows = records_of(item.block.view, slice(item.block.start, item.block.stop))
            ones = {t: np.ones((item.block.rows, *s.shape)) for t, s in taps.items()}
            given = {**ones, **rows}
            writer.write_block(item.block, {tap: given[tap] for tap in item.taps})
    return path


def without(manifest: object) -> dict[str, Any]:
    """What must survive: all but what is measured again."""
    return {key: value for key, value in vars(manifest).items() if key != "measured"}


@pytest.mark.parametrize("damage", ["one bit", "cut off", "gone"])
@pytest.mark.parametrize("taps", [{**TAPS, **FURTHER}, REDUCED], ids=["further", "reduced"])
def test_a_pass_for_less_keeps_all_views_and_taps_of_a_cache_without_a_manifest(
    tmp_path: Path, damage: str, taps: Mapping[str, TapSpec]
) -> None:
    path = fill_any(tmp_path / "c", taps, num_views=4)
    before = read_manifest(path)
    file = path / "manifest.json"
    if damage == "one bit":
        flip(file, file.stat().st_size // 2)
    elif damage == "cut off":
        os.truncate(file, file.stat().st_size // 2)
    else:
        file.unlink()
    asked = {tap: taps[tap] for tap in TAPS}
    with open_writer(path, taps=asked, num_views=1, block_rows=2) as writer:
        assert writer.work == []
    assert without(read_manifest(path)) == without(before)
    opened = TeacherCache.open(path)
    assert opened.faults() == []
    assert opened.read_view(3)["correct"].tolist() == records_of(3, slice(None))["correct"].tolist()


def test_a_damaged_description_is_outvoted_by_the_others(tmp_path: Path) -> None:
    path = fill_any(tmp_path / "c", {**TAPS, **FURTHER}, num_views=4)
    before = read_manifest(path)
    for array, key, value in (("logits", "shape", [1, 11, 3]), ("stage1", "shape", "odd")):
        file = path / "teacher.zarr" / array / "zarr.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    (path / "manifest.json").write_text("{")
    with open_writer(path, num_views=1) as writer:
        assert writer.work == []
    assert without(read_manifest(path)) == without(before)
    assert TeacherCache.open(path).faults() == []


def test_a_hint_whose_stage_nobody_knows_is_an_error_and_not_another_stages(tmp_path: Path) -> None:
    taps = {**TAPS, "stage2": TapSpec((5,), "float32"), "hint": FURTHER["hint"]}
    path = fill_any(tmp_path / "c", taps)
    flip(path / "manifest.json", 40)
    other = {**taps, "hint": TapSpec((5, 2, 2), "float16", stage="stage2")}
    with pytest.raises(CacheMismatch, match="only it named the stage of") as error:
        open_writer(path, taps=other)
    assert str(error.value).endswith(f"(rm -r {path}/teacher.zarr/hint), then run again")


def cut_once(part: str) -> Callable[[str, str, int], str | None]:
    """The first answer of the store with this object is cut off."""
    return lambda method, path, before: (
        "half" if method == "GET" and path.endswith(part) and not before else None
    )


def test_a_manifest_that_arrives_truncated_once_is_fetched_again(
    server: Server, spool: Path
) -> None:
    remote_cache.fill(spool, num_views=3)
    with remote_cache.opened(spool, num_views=3) as writer:
        writer.finish({"images_per_second": 1.0})  # which a new manifest would lack
    before = server.ask("GET", f"{remote_cache.CACHE}/manifest.json")
    server.requests.clear()
    server.spoil = cut_once("manifest.json")
    assert TeacherCache.open(remote_cache.url()).num_views == 3
    server.requests.clear()
    with remote_cache.opened(spool, num_views=1) as writer:
        assert writer.work == []
    assert server.ask("GET", f"{remote_cache.CACHE}/manifest.json") == before


def test_a_pass_for_fewer_views_keeps_those_of_a_bucket_whose_manifest_is_damaged(
    server: Server, spool: Path
) -> None:
    remote_cache.fill(spool, num_views=3)
    remote_cache.flip(server, "manifest.json")
    with pytest.raises(CacheError, match=r"manifest\.json is damaged"):
        TeacherCache.open(remote_cache.url())
    assert remote_cache.fill(spool, num_views=1) == 0
    opened = TeacherCache.open(remote_cache.url())
    assert (opened.num_views, opened.faults()) == (3, [])


def test_a_manifest_that_is_read_truncated_once_is_read_again(
    small_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from teach_once.store.format import manifest

    reads: list[bytes] = []
    read_bounded = manifest.read_bounded

    def cut_first(path: Path, most_bytes: int) -> bytes:
        reads.append(read_bounded(path, most_bytes))
        return reads[-1] if len(reads) > 1 else reads[-1][:100]

    monkeypatch.setattr(manifest, "read_bounded", cut_first)
    assert read_manifest(small_cache).num_views == 2
    assert len(reads) == 2
